// Another question about the job that is open. Of one frame: the answer stands here until another job is opened, and is
// stored nowhere. Of all frames: that is a new job over the same video.

// Call an endpoint through Gradio's queue, which gives each caller a turn -> what it returns. Throws Problem.
async function callQueued(endpoint, ...data) {
  const path = `/gradio_api/call/${endpoint}`;
  const { event_id } = await call("POST", path, { data });
  const events = await call("GET", `${path}/${event_id}`, undefined, "text"); // they end with the answer
  const [, kind, told] = /^event: (complete|error)\ndata: (.*)$/m.exec(events) ?? [];
  const answer = told ? JSON.parse(told) : null;
  if (kind === "complete") return answer[0];
  throw new Problem(500, { detail: answer?.error ?? "The question could not be answered. Ask again." });
}

// section: where it goes. frame(): the frame of the moment, or undefined. onUse(): the user is about to ask.
// onGo(frame_idx): an answer's time was chosen.
function mountAsk(section, frame, onUse, onGo) {
  let job = null; // {id} of the job that is open: answers that come for another one are dropped
  const field = node("input", {
    type: "text",
    id: "mr-ask",
    maxlength: 4000,
    autocomplete: "off",
    "aria-describedby": "mr-ask-hint mr-ask-error",
    oninput: () => tell(""),
  });
  const one = node("button", { class: "mr-primary" }, "This frame");
  const all = node("button", { type: "button", onclick: () => ask(askAll) }, "All frames");
  const hint = node("p", { class: "mr-soft mr-ask-hint", id: "mr-ask-hint" });
  const error = node("p", { class: "mr-error", role: "alert", id: "mr-ask-error" });
  const answers = node("ol", { class: "mr-answers", role: "list", "aria-label": "Answers", "aria-live": "polite" });
  const asking = node("div", { class: "mr-ask-row" }, field, one, all);
  const label = node("label", { for: "mr-ask" }, "Ask another question");
  const form = node("form", { class: "mr-ask-form", novalidate: true }, label, asking, error, hint);
  form.addEventListener("submit", (event) => (event.preventDefault(), ask(askOne)));
  form.addEventListener("focusin", onUse);
  section.replaceChildren(form, answers);

  async function ask(send) {
    const question = field.value.trim();
    if (job.isAsking) return tell("One question at a time: wait for the answer.");
    if (!question) return tell("Write a question.");
    tell("");
    const mine = job;
    setAsking(true);
    try {
      await send(mine, question);
      if (job === mine) tell("");
    } catch (problem) {
      if (job === mine) tell(problem.status ? problem.message : "The server cannot be reached. Ask again.");
    }
    if (job === mine) setAsking(false);
  }

  async function askOne(mine, question) {
    const shown = frame();
    if (!shown) throw new Problem(404, { detail: "No frame is described at this moment. Choose one." });
    const { frame_idx, timestamp_ms } = shown;
    const text = node("p", { class: "mr-answer-text mr-soft" }, "Answering…");
    const go = node("button", { type: "button", class: "mr-answer-time", onclick: () => onGo(frame_idx) });
    go.textContent = clock(timestamp_ms);
    const entry = node("li", {}, go, node("p", { class: "mr-soft" }, question), text);
    answers.prepend(entry);
    answers.scrollTop = 0;
    try {
      const { answer } = await callQueued("ask", mine.id, frame_idx, question);
      text.textContent = answer || "(no text)";
      text.classList.remove("mr-soft");
    } catch (problem) {
      entry.remove();
      throw problem;
    }
  }

  async function askAll(mine, question) {
    const { job_id } = await call("POST", `/api/jobs/${mine.id}/ask`, { question });
    if (job === mine) openJob(job_id);
  }

  function setAsking(isAsking) {
    job.isAsking = isAsking;
    for (const button of [one, all]) button.setAttribute("aria-disabled", String(isAsking));
  }

  function tell(problem) {
    error.textContent = problem;
    if (!problem) return field.removeAttribute("aria-invalid");
    field.setAttribute("aria-invalid", "true");
    if (form.contains(document.activeElement)) field.focus(); // else the user has gone on, and hears it
  }

  return {
    open(jobId) {
      job = { id: jobId, isAsking: false };
      answers.replaceChildren();
      field.value = "";
      tell("");
      setAsking(false);
      [section.hidden, all.hidden] = [true, true]; // until it is known what can be asked
    },
    close() {
      job = null;
    },
    // What can be asked of the job: nothing before a frame is described, all frames once it has ended.
    update(status, numFrames) {
      section.hidden = !numFrames;
      all.hidden = !isFinished(status);
      hint.textContent = all.hidden
        ? "Answers are not stored: they stay until you leave this job."
        : "Answers are not stored: they stay until you leave this job. All frames make a new job.";
    },
  };
}
