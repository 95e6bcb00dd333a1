// The form of a new job: a video by file or URL, what to ask of its frames, and how many of them. Each error stands
// beside the field it belongs to. While a job is open, the form is hidden.

const FILE_TYPES = "video/*,.mkv,.avi,.ts,.flv,.wmv,.ogv,.ivf,image/gif";
const QUESTIONS = {
  "Describe the scene": "Describe this scene.",
  "List objects": "List the objects.",
  "What people do": "What are the people doing?",
  "Read text": "What text is on the screen?",
  "Yes or no…": "Is there a person in the picture? Answer yes or no.",
};
const FPS_STEPS = [0.1, 0.2, 0.5, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 24, 25, 30]; // the slider's stops
const [MIN_FPS, MAX_FPS] = [FPS_STEPS[0], FPS_STEPS.at(-1)];

// POST a form with its files. Gives {done: a promise like call()'s, abort}; onProgress gets the share sent, 0 to 1.
function postForm(path, data, onProgress) {
  const request = new XMLHttpRequest();
  const done = new Promise((resolve, reject) => {
    const fail = (detail) => reject(new Problem(0, { code: "offline", detail }));
    const lost = "The upload broke off: the server refused the file or cannot be reached. Try again.";
    request.upload.addEventListener("progress", (event) => onProgress(event.loaded / (event.total || 1)));
    request.addEventListener("abort", () => fail("The upload was aborted. Nothing was submitted."));
    request.addEventListener("error", () => fail(lost));
    request.addEventListener("load", () => {
      if (request.status === 401) bus.dispatchEvent(new Event("login"));
      if (request.status === 202 && request.response) resolve(request.response);
      else reject(new Problem(request.status, request.response ?? {}));
    });
  });
  request.responseType = "json";
  request.open("POST", base + path);
  request.send(data);
  return { done, abort: () => request.abort() };
}

// The video's file: chosen or dropped, with a preview where the browser can play it. onChange is told of each change.
function filePicker(onChange) {
  const picker = { file: null, duration_s: null };
  const input = node("input", { type: "file", accept: FILE_TYPES, class: "mr-file-input", onchange: () => take() });
  const icon = node("span", { class: "mr-drop-icon", "aria-hidden": "true" });
  const asked = node("strong", {}, "Choose a video");
  const drop = node("label", { class: "mr-drop" }, input, icon, asked, node("span", {}, "or drop it here"));
  const preview = node("div", { class: "mr-preview" });
  const [name, facts] = [node("strong", { class: "mr-file-name" }), node("span", { class: "mr-soft" })];
  const remove = node("button", { type: "button", onclick: () => (picker.choose(null), input.focus()) }, "Remove");
  const about = node("p", { class: "mr-file-about" }, name, facts);
  const chosen = node("div", { class: "mr-chosen", hidden: true }, preview, about, remove);
  let address = null;

  function take() {
    if (input.files.length) picker.choose(input.files[0]);
    input.value = ""; // so that the same file can be chosen again
  }

  function say(text) {
    facts.textContent = [byteText(picker.file.size), text].filter(Boolean).join(" · ");
  }

  function show(file) {
    const isGif = file.type === "image/gif";
    const cannot = () => preview.replaceChildren(node("p", { class: "mr-soft" }, "This browser has no preview of it."));
    const media = isGif
      ? node("img", { alt: "The chosen picture", onerror: cannot })
      : node("video", { controls: true, playsinline: true, "aria-label": "Preview", onerror: cannot });
    media.muted = true;
    media.addEventListener("loadedmetadata", () => {
      if (picker.file !== file) return;
      if (!media.videoWidth) cannot(); // sound only
      if (!Number.isFinite(media.duration)) return;
      picker.duration_s = media.duration;
      say(clock(media.duration * 1000));
      onChange();
    });
    media.src = address = URL.createObjectURL(file);
    preview.replaceChildren(media);
  }

  picker.choose = (file) => {
    if (address) URL.revokeObjectURL(address);
    [picker.file, picker.duration_s, address] = [file, null, null];
    preview.replaceChildren();
    chosen.hidden = !file;
    drop.classList.toggle("mr-drop-small", Boolean(file));
    asked.textContent = file ? "Choose another video" : "Choose a video";
    if (file) {
      name.textContent = file.name;
      say("");
      show(file);
    }
    onChange();
  };
  return Object.assign(picker, { input, parts: [chosen, drop] });
}

// Frames per second: a number for any rate, and a slider that stops at round ones.
function rateField(onChange) {
  const number = node("input", { type: "number", min: MIN_FPS, max: MAX_FPS, step: "any", value: 1 });
  const last = FPS_STEPS.length - 1;
  const range = node("input", { type: "range", min: 0, max: last, "aria-label": "Frames per second, slider" });
  const follow = () => {
    const rate = number.valueAsNumber || 1;
    const distance = (step) => Math.abs(Math.log(step / rate));
    range.value = FPS_STEPS.reduce((best, step, i) => (distance(step) < distance(FPS_STEPS[best]) ? i : best), 0);
    range.style.setProperty("--share", `${(100 * range.value) / last}%`);
    range.setAttribute("aria-valuetext", `${FPS_STEPS[range.value]} per second`);
  };
  number.addEventListener("input", () => (follow(), onChange()));
  range.addEventListener("input", () => ((number.value = FPS_STEPS[range.value]), follow(), onChange()));
  follow();
  const end = (text) => node("span", { class: "mr-soft", "aria-hidden": "true" }, text);
  return { number, track: node("div", { class: "mr-rate" }, end(MIN_FPS), range, end(MAX_FPS)) };
}

function mountForm(section) {
  const fields = new Map(); // {control, error} by the API's name of the field
  let sent = null; // while submitting: {abort}

  // A control with its label, hint and place for an error; parts stand between label and error.
  function field(name, label, control, { hint = null, parts = [control], labelled = true } = {}) {
    const error = node("p", { class: "mr-error", id: `mr-${name}-error` });
    control.id = `mr-${name}`;
    if (hint) hint.id = `mr-${name}-hint`;
    control.setAttribute("aria-describedby", `${hint ? `${hint.id} ` : ""}${error.id}`);
    control.addEventListener("input", () => clearError(name));
    fields.set(name, { control, error });
    const title = labelled ? node("label", { for: control.id }, label) : node("span", { class: "mr-title" }, label);
    return node("div", { class: "mr-field", "data-name": name }, title, ...parts, hint, error);
  }

  function textField(name, label, attributes, hint) {
    const control = node("input", { type: "text", autocomplete: "off", ...attributes });
    return field(name, label, control, { hint: hint ? node("span", { class: "mr-soft" }, hint) : null });
  }

  const control = (name) => fields.get(name).control;
  const text = (name) => control(name).value.trim();
  const card = (child) => node("div", { class: `mr-card mr-area-${child.dataset.name}` }, child);
  const picker = filePicker(() => {
    clearError("file");
    clearError("video_url");
    if (picker.file) control("video_url").value = "";
    sample.hidden = Boolean(picker.file);
    tellFrames();
  });
  const sample = node("button", { type: "button", onclick: takeSample }, "Try the sample video");
  picker.parts.push(sample);
  const rate = rateField(() => (clearError("target_fps"), tellFrames()));
  const rateHint = node("span", { class: "mr-soft", "aria-live": "polite" });
  const questionHint = node("span", { class: "mr-soft" });
  const question = node("input", { type: "text", maxlength: 4000, value: QUESTIONS["Describe the scene"] });
  const chips = Object.entries(QUESTIONS).map(([label, asked]) => {
    return node("button", { type: "button", class: "mr-chip", title: asked, onclick: () => ask(asked) }, label);
  });
  const choices = node("div", { class: "mr-chips", role: "group", "aria-label": "Ready-made questions" }, ...chips);
  const lengths = ["short", "normal", "long"].map((length) => node("option", { value: length }, `${length} caption`));
  const caption = node("select", {}, node("option", { value: "" }, "no: ask the question"), ...lengths);
  const alike = node("select", {}, node("option", { value: "" }, "take over the answer"));
  alike.append(node("option", { value: "0" }, "describe each"));
  const options = [
    textField("start_s", "Start", { placeholder: "0:00" }, "such as 83 or 1:23"),
    textField("end_s", "End", { placeholder: "end of the video" }, "such as 0:01:23.5"),
    field("caption_length", "Caption instead", caption),
    field("reuse_similar", "Frames that look alike", alike),
    textField("max_frames", "Most frames", { inputmode: "numeric", placeholder: "all" }),
    textField("max_tokens", "Longest answer", { inputmode: "numeric", placeholder: "256" }, "in tokens"),
  ];
  const more = node("details", { class: "mr-more" }, node("summary", {}, "More options"));
  more.append(node("div", { class: "mr-more-fields" }, ...options));
  const describe = node("button", { class: "mr-primary mr-describe" }, "Describe");
  const inputs = node("div", { class: "mr-inputs" }, // set inert while a file is sent
    card(field("file", "Video file", picker.input, { parts: picker.parts, labelled: false })),
    card(textField("video_url", "…or video URL", { inputmode: "url", placeholder: "https://example.com/clip.mp4" })),
    card(field("question", "Question for each frame", question, { parts: [question, choices], hint: questionHint })),
    card(field("target_fps", "Frames per second", rate.number, { parts: [rate.number, rate.track], hint: rateHint })),
    more,
  );
  const failure = node("p", { class: "mr-error", role: "alert", id: "mr-submit-error" });
  const bar = node("progress", { max: 1, value: 0, "aria-label": "Upload" });
  const percent = node("span", { class: "mr-soft" });
  const abort = node("button", { type: "button", onclick: () => sent?.abort() }, "Abort");
  const sending = node("div", { class: "mr-sending", hidden: true }, bar, percent, abort);
  const form = node("form", { class: "mr-form", novalidate: true, onsubmit: submit });
  form.append(inputs, describe, failure, sending);
  section.append(form);

  function ask(asked) {
    question.value = asked;
    clearError("question");
    markChip();
    const word = asked.indexOf("a person"); // the yes/no question is there to be edited
    if (word < 0) return;
    question.focus();
    question.setSelectionRange(word, word + "a person".length);
  }

  function markChip() {
    for (const chip of chips) chip.setAttribute("aria-pressed", String(chip.title === text("question")));
  }

  // How many frames the rate means for this video, or for the part of it that is asked for.
  function tellFrames() {
    const fps = rate.number.valueAsNumber;
    const [start, end] = [readSeconds(text("start_s")) || 0, readSeconds(text("end_s"))];
    const most = Number(text("max_frames"));
    const until = Math.min(picker.duration_s ?? Infinity, Number.isNaN(end) ? Infinity : end);
    const limit = (frames) => Math.max(1, most >= 1 ? Math.min(frames, most) : frames);
    if (!(fps >= MIN_FPS && fps <= MAX_FPS) || until <= start) {
      rateHint.textContent = "";
    } else if (until === Infinity) {
      rateHint.textContent = `${countText(Math.round(fps * 60), "frame")} per minute of video`;
      if (most >= 1) rateHint.textContent += `, ${most} at most`;
    } else {
      const [frames, length] = [Math.ceil((until - start) * fps - 0.01), clock((until - start) * 1000)];
      rateHint.textContent = `about ${countText(limit(frames), "frame")} for ${length.replace(/\.0$/, "")}`;
    }
  }

  function tellCaption() {
    question.disabled = Boolean(caption.value);
    for (const chip of chips) chip.disabled = question.disabled;
    questionHint.textContent = caption.value && `Each frame gets a ${caption.value} caption instead (More options).`;
  }

  function clearError(name) {
    fields.get(name).error.textContent = "";
    fields.get(name).control.removeAttribute("aria-invalid");
  }

  // problems: [[name of a field, or "" for the whole, message]]. Focus goes to the first.
  function showErrors(problems) {
    for (const [name, message] of problems) {
      const known = fields.get(name);
      (known?.error ?? failure).textContent = message;
      known?.control.setAttribute("aria-invalid", "true");
      if (known && more.contains(known.control)) more.open = true;
    }
    (fields.get(problems[0][0])?.control ?? describe).focus();
  }

  function check() {
    const found = [];
    const [url, file, fps] = [text("video_url"), picker.file, rate.number.valueAsNumber];
    const [start, end] = [text("start_s"), text("end_s")].map((given) => (given ? readSeconds(given) : null));
    if (!file && !url) found.push(["file", "Choose a video file, or give a URL below."]);
    if (file && !file.size) found.push(["file", "The file is empty. Choose another."]);
    else if (file && /^(audio|text\/plain|image\/(?!gif)|application\/(pdf|zip))/.test(file.type))
      found.push(["file", `This is no video (${file.type}). Choose another file.`]);
    if (url && !(/^https?:\/\//i.test(url) && URL.canParse(url)))
      found.push(["video_url", "Write a whole address that begins with https:// or http://."]);
    if (!caption.value && !text("question")) found.push(["question", "Write a question, or choose one below."]);
    if (!(fps >= MIN_FPS && fps <= MAX_FPS)) found.push(["target_fps", `Use a number from ${MIN_FPS} to ${MAX_FPS}.`]);
    const times = "Write a time in seconds (83), or as 1:23 or 0:01:23.5.";
    if (Number.isNaN(start)) found.push(["start_s", times]);
    else if (picker.duration_s && start >= picker.duration_s)
      found.push(["start_s", `The video ends at ${clock(picker.duration_s * 1000)}. Start before that.`]);
    if (Number.isNaN(end)) found.push(["end_s", times]);
    else if (end !== null && end <= (start || 0)) found.push(["end_s", "The end has to be after the start."]);
    for (const name of ["max_frames", "max_tokens"])
      if (!/^(0*[1-9]\d{0,14})?$/.test(text(name))) found.push([name, "Use a whole number above 0, or none."]);
    return found;
  }

  // The fields as the API takes them; what is left empty is left out.
  function values() {
    const asked = { target_fps: rate.number.valueAsNumber, question: caption.value ? "" : text("question") };
    Object.assign(asked, { caption_length: caption.value, video_url: text("video_url") });
    for (const name of ["start_s", "end_s"]) asked[name] = text(name) && readSeconds(text(name));
    for (const name of ["max_frames", "max_tokens", "reuse_similar"]) asked[name] = text(name) && Number(text(name));
    return Object.fromEntries(Object.entries(asked).filter(([, value]) => value !== ""));
  }

  // Which field an answer of the API is about.
  function locate({ code, message }) {
    const places = { invalid_video_url: "video_url", question_too_long: "question" };
    const place = places[code] ?? (/^(too_large|not_a_video)$/.test(code) && (picker.file ? "file" : "video_url"));
    if (place) return [[place, message]];
    if (code !== "invalid_field") return [["", message]];
    return message.split(/; (?=[a-z_]+: )/).map((part) => {
      const [, name] = /^([a-z_]+)\b/.exec(part) ?? [];
      if (!fields.has(name)) return ["", part];
      return [name, part.replace(/^[a-z_]+: ./, (start) => start.at(-1).toUpperCase())];
    });
  }

  function onProgress(share) {
    bar.value = share;
    percent.textContent = `${Math.floor(share * 100)}% of ${byteText(picker.file.size)}`;
    if (share < 1) return;
    bar.removeAttribute("value");
    percent.textContent = "The server checks it…";
  }

  function setSending(isSending) {
    inputs.inert = isSending;
    describe.setAttribute("aria-disabled", String(isSending));
    describe.textContent = isSending ? (picker.file ? "Uploading…" : "Submitting…") : "Describe";
    sending.hidden = !(isSending && picker.file);
    if (!sending.hidden) abort.focus();
    sent = isSending ? sent : null;
  }

  function send(asked) {
    if (!picker.file) return { done: call("POST", "/api/submit", asked), abort: () => {} };
    const data = new FormData();
    for (const [name, value] of Object.entries(asked)) data.append(name, value);
    data.append("file", picker.file, picker.file.name); // last, so that a wrong field is known before it
    return postForm("/api/upload", data, onProgress);
  }

  async function submit(event) {
    event.preventDefault();
    if (sent) return;
    for (const name of fields.keys()) clearError(name);
    failure.textContent = "";
    const found = check();
    if (found.length) return showErrors(found);
    const asked = values();
    if (picker.file) onProgress(0);
    sent = send(asked);
    setSending(true);
    try {
      const { job_id } = await sent.done;
      setSending(false);
      openJob(job_id);
    } catch (problem) {
      setSending(false);
      showErrors(problem instanceof Problem ? locate(problem) : [["", String(problem)]]);
    }
  }

  // The video that comes with the project, as if it had been chosen: there is something to describe at once.
  async function takeSample() {
    sample.disabled = true;
    try {
      const video = await call("GET", "/api/sample.mp4", undefined, "blob");
      const hadFocus = document.activeElement === sample || document.activeElement === document.body;
      picker.choose(new File([video], "sample.mp4", { type: "video/mp4" }));
      if (hadFocus) describe.focus({ preventScroll: true });
    } catch (problem) {
      showErrors([["file", problem.message]]);
    }
    sample.disabled = false;
  }

  function dragged(event) {
    if (![...event.dataTransfer.types].includes("Files") || sent) return;
    event.preventDefault();
    const isLeaving = event.type === "dragleave" && !form.contains(event.relatedTarget);
    form.classList.toggle("mr-dropping", event.type !== "drop" && !isLeaving);
    if (event.type === "drop" && event.dataTransfer.files.length) picker.choose(event.dataTransfer.files[0]);
  }

  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) form.addEventListener(kind, dragged);
  control("video_url").addEventListener("input", () => {
    if (text("video_url") && picker.file) picker.choose(null);
    clearError("file");
  });
  for (const name of ["start_s", "end_s", "max_frames"]) control(name).addEventListener("input", tellFrames);
  question.addEventListener("input", markChip);
  caption.addEventListener("input", tellCaption);
  markChip();
  tellFrames();
  return {
    show() {
      form.hidden = false;
    },
    hide() {
      form.hidden = !sent; // an upload that runs can still be aborted
    },
    focus: () => picker.input.focus(),
  };
}
