// One job: its state, the live data, the player, and the description of the moment. The list (list.js), the strip
// (strip.js) and the player (player.js) show the same frame: whoever changes it, `select` tells the others. What is asked
// of it besides is ask.js's.

const POLL_MS = 2000; // speed, time left, place in the queue
const FLUSH_MS = 250; // new frames are drawn together
const LIVE_MS = 1000; // the player goes to the newest frame at most so often
const SPEAK_MS = 12000; // what screen readers are told while a job runs
const SHORTCUTS_KEY = "moonreel-shortcuts";

function mountViewer(section) {
  let job = null; // all about the job that is open
  const unseen = node("p", { class: "mr-unseen", role: "status" });
  const [title, about, line] = [
    node("h2", { class: "mr-video-name", tabindex: -1 }),
    node("p", { class: "mr-soft" }),
    node("p", { class: "mr-line" }),
  ];
  const cancel = node("button", { type: "button", onclick: () => change("cancel") }, "Cancel");
  const retry = node("button", { type: "button", class: "mr-primary", onclick: () => change("retry") }, "Retry");
  const again = node("button", { type: "button", onclick: () => bus.dispatchEvent(new Event("leave")) }, "New job");
  const filled = node("div", { class: "mr-bar-fill" });
  const bar = node(
    "div",
    { class: "mr-bar", role: "progressbar", "aria-label": "Progress", "aria-valuemin": 0, "aria-valuemax": 100 },
    filled,
  );
  const captions = node("input", { type: "checkbox", id: "mr-captions" });
  const reason = node("p", { class: "mr-reason mr-error", hidden: true });
  const warnings = node("p", { class: "mr-soft mr-warnings", hidden: true });
  const stage = node("div", { class: "mr-stage" });
  const [time, text] = [node("p", { class: "mr-now-time" }), node("p", { class: "mr-now-text" })];
  const now = node(
    "div",
    { class: "mr-now", role: "region", "aria-label": "Description of this frame", tabindex: 0 },
    time,
    text,
  );
  const asking = node("div", { class: "mr-ask" });
  const [panel, film] = [node("div", { class: "mr-list mr-card" }), node("div", { class: "mr-strip" })];
  const split = node("div", { class: "mr-split" }, node("div", { class: "mr-player" }, stage, now, asking), panel);
  const [exports, code] = [node("p", { class: "mr-exports" }), node("div", { class: "mr-code" })];
  const pictureOf = (frame) => `${base}/api/jobs/${job.id}/frames/${frame.frame_idx}.jpg`;
  const shortcuts = node("input", { type: "checkbox" }); // single keys can be in the way of speech input (WCAG 2.1.4)
  const keys = node(
    "div",
    { class: "mr-soft mr-keys" },
    node("span", {}, "Keys: ← → frame by frame, Home and End, space to play, / to search."),
    node("label", { class: "mr-check" }, shortcuts, "Keyboard shortcuts"),
  );
  remember(shortcuts, SHORTCUTS_KEY);
  const player = mountPlayer(stage, captions, pictureOf, () => job && moment(), touch);
  const ask = mountAsk(asking, () => job.frames[job.current], touch, (frameIdx) => pick(job.byIdx.get(frameIdx)));
  const list = mountList(panel, pick, touch);
  const strip = mountStrip(film, pictureOf, pick, touch);
  section.replaceChildren(
    unseen,
    node(
      "div",
      { class: "mr-head" },
      node("div", { class: "mr-about" }, title, about),
      node("div", { class: "mr-actions" }, cancel, retry, again),
    ),
    node(
      "div",
      { class: "mr-progress" },
      bar,
      line,
      node("label", { class: "mr-check", for: "mr-captions" }, captions, "Captions"),
    ),
    reason,
    warnings,
    split,
    film,
    exports,
    node("details", { class: "mr-use" }, node("summary", {}, "Use it from code"), code),
    keys,
  );

  document.addEventListener("keydown", onKey);
  document.addEventListener("keyup", (event) => event.key === " " && isPlayKey(event) && event.preventDefault());
  document.addEventListener("visibilitychange", () => (document.hidden ? disconnect() : job && refresh(job)));
  bus.addEventListener("changed", (event) => event.detail === job?.id && refresh(job));

  function open(jobId) {
    section.hidden = false;
    if (job?.id === jobId) return;
    const hadFocus = section.contains(document.activeElement);
    close();
    section.hidden = false;
    job = {
      id: jobId,
      status: null,
      frames: [],
      groups: [],
      seq: 0,
      current: -1,
      byIdx: new Map(),
      arrived: [],
      isLive: !calm.matches,
    };
    title.textContent = "Loading…";
    if (hadFocus || !document.activeElement?.getClientRects().length) title.focus({ preventScroll: true }); // else it is lost
    ask.open(jobId);
    load(job);
  }

  function close() {
    section.hidden = true;
    disconnect();
    window.clearTimeout(job?.poll);
    window.clearTimeout(job?.flush);
    job = null;
    ask.close();
    player.close();
    list.clear();
    strip.clear();
    for (const part of [title, about, line, time, text, unseen]) part.textContent = "";
    for (const part of [cancel, retry, reason, warnings]) part.hidden = true;
    for (const part of [exports, code]) part.replaceChildren();
    for (const part of [split, film, exports, keys]) part.hidden = false;
    section.removeAttribute("data-missing");
    bar.dataset.status = "";
    filled.style.transform = "scaleX(0)";
  }

  async function load(mine) {
    try {
      const status = await call("GET", `/api/status/${mine.id}?include_results=false`);
      if (job !== mine) return;
      if (isFinished(status)) mine.isLive = false;
      showStatus(status);
      await loadFrames(mine);
      follow(mine);
    } catch (problem) {
      showProblem(mine, problem, load);
    }
  }

  async function loadFrames(mine) {
    for (let isMore = true; isMore && job === mine;) {
      const page = await call("GET", `/api/jobs/${mine.id}/frames?after=${mine.seq}&limit=1000`);
      if (job !== mine) return;
      take(mine, page.frames);
      flush(mine);
      isMore = page.frames.length === 1000;
    }
  }

  // Read the status again, and what came meanwhile; then go on following.
  async function refresh(mine) {
    window.clearTimeout(mine.poll);
    try {
      const status = await call("GET", `/api/status/${mine.id}?include_results=false`);
      if (job !== mine) return;
      if (status.last_seq < mine.seq && !mine.events) return reopen(); // a retry began anew
      showStatus(status);
      if (isFinished(status) && mine.seq < status.last_seq) await loadFrames(mine);
      follow(mine);
    } catch (problem) {
      showProblem(mine, problem, refresh);
    }
  }

  function reopen() {
    const { id } = job;
    close();
    open(id);
  }

  function showProblem(mine, problem, again) {
    if (job !== mine) return;
    if (problem.code === "job_not_found" && mine.status) return bus.dispatchEvent(new Event("leave")); // deleted meanwhile
    disconnect();
    reason.textContent = problem.message;
    reason.hidden = false;
    if (!mine.status) title.textContent = "This job cannot be shown";
    section.toggleAttribute("data-missing", !mine.status);
    if (problem.status === 0 || problem.status >= 500)
      mine.poll = window.setTimeout(() => job === mine && again(mine), 3000);
    else [cancel.hidden, retry.hidden] = [true, true];
  }

  function follow(mine) {
    if (job !== mine || isFinished(mine.status) || document.hidden) return;
    window.clearTimeout(mine.poll);
    mine.poll = window.setTimeout(() => job === mine && refresh(mine), POLL_MS);
    if (mine.events) return;
    const events = new EventSource(`${base}/api/jobs/${mine.id}/events?after=${mine.seq}`, { withCredentials: true });
    mine.events = events;
    const merge = (event) => {
      const { video_url: _shortened, ...summary } = JSON.parse(event.data);
      flush(mine);
      showStatus({ ...mine.status, ...summary });
    };
    events.addEventListener("frame", (event) => take(mine, [JSON.parse(event.data)]));
    events.addEventListener("progress", merge);
    events.addEventListener("done", (event) => {
      disconnect();
      merge(event);
      if (mine.isLive && mine.frames.length && mine.status.status === "completed") pick(mine.frames[0], false); // ready to be watched
      refresh(mine);
      bus.dispatchEvent(new CustomEvent("changed", { detail: mine.id }));
    });
    events.addEventListener("error", () => {
      if (events.readyState === EventSource.CLOSED && mine.events === events) disconnect(); // the next refresh goes on
    });
  }

  function disconnect() {
    job?.events?.close();
    if (job) job.events = null;
  }

  function take(mine, frames) {
    if (!frames.length) return;
    mine.arrived.push(...frames);
    mine.seq = frames.at(-1).seq;
    mine.flush ||= window.setTimeout(() => flush(mine), FLUSH_MS);
  }

  // Draw what has arrived.
  function flush(mine) {
    window.clearTimeout(mine.flush);
    mine.flush = 0;
    if (job !== mine || !mine.arrived.length) return;
    const shown = mine.frames[mine.current]?.frame_idx;
    let isInOrder = true;
    for (const frame of mine.arrived.splice(0)) {
      isInOrder &&= !mine.frames.length || frame.frame_idx > mine.frames.at(-1).frame_idx;
      mine.byIdx.set(frame.frame_idx, frame);
      if (isInOrder) mine.frames.push(frame);
    }
    if (!isInOrder) mine.frames = [...mine.byIdx.values()].sort((a, b) => a.frame_idx - b.frame_idx);
    mine.groups = fold(mine.frames);
    list.update(mine.groups);
    strip.update(mine.frames);
    showVideo();
    ask.update(mine.status, mine.frames.length);
    player.caption(mine.groups, mine.status.duration_s);
    const newest = mine.frames.at(-1);
    if (mine.isLive && !isFinished(mine.status) && Date.now() - (mine.jumpedAt ?? 0) > LIVE_MS) {
      mine.jumpedAt = Date.now();
      player.seek(newest);
      select(mine.frames.length - 1);
    } else if (shown === undefined) moment();
    else select(bisect(mine.frames, (frame) => frame.frame_idx < shown));
  }

  function showStatus(status) {
    const before = job.status;
    job.status = status;
    const parts = progressParts(status);
    line.textContent = parts.join(" · ");
    bar.setAttribute("aria-valuenow", Math.round(status.progress));
    bar.setAttribute("aria-valuetext", parts.join(", "));
    bar.dataset.status = status.status;
    filled.style.transform = `scaleX(${status.progress / 100})`;
    cancel.hidden = isFinished(status);
    retry.hidden = !["failed", "canceled"].includes(status.status);
    reason.textContent = status.error_message ?? "";
    reason.hidden = !status.error_message;
    warnings.textContent = [
      ...(status.warnings ?? []),
      status.truncated ? "Only the first frames were described (max_frames)." : "",
    ]
      .filter(Boolean)
      .join(" ");
    warnings.hidden = !warnings.textContent;
    const isBare = ["failed", "canceled"].includes(status.status) && !status.frames_processed; // there is nothing to see
    for (const part of [split, film, exports, keys]) part.hidden = isBare;
    ask.update(status, job.frames.length);
    if (!before) showJob(status);
    section.removeAttribute("data-missing");
    const percent = isFinished(status) ? "" : `${Math.floor(status.progress)}% `;
    bus.dispatchEvent(new CustomEvent("title", { detail: percent + videoName(status) }));
    if (before?.status !== status.status || Date.now() - (job.spokeAt ?? 0) > SPEAK_MS) {
      job.spokeAt = Date.now();
      speak([...parts.slice(0, 2), status.error_message].filter(Boolean).join(", "));
    }
    showVideo();
  }

  function showJob(status) {
    title.textContent = videoName(status);
    about.textContent = `${askedText(status)} · ${status.input_target_fps} fps`;
    if (status.source_job_id) about.append(" · ", sourceLink(status.source_job_id));
    const link = (format) =>
      node(
        "a",
        { class: "mr-export", href: `${base}/api/jobs/${job.id}/export?format=${format}`, download: "" },
        format.toUpperCase(),
      );
    exports.replaceChildren(
      node("span", { class: "mr-soft" }, "Download"),
      ...["json", "jsonl", "csv", "srt", "vtt"].map(link),
    );
    code.replaceChildren(...codeNodes(status, speak));
  }

  function sourceLink(jobId) {
    const visit = (event) => (event.preventDefault(), openJob(jobId));
    return node("a", { class: "mr-link", href: `?job=${encodeURIComponent(jobId)}`, onclick: visit }, "asked of an earlier job");
  }

  function speak(words) {
    unseen.textContent = words;
  }

  async function change(what) {
    const mine = job;
    [cancel.disabled, retry.disabled] = [true, true];
    try {
      await call("POST", `/api/jobs/${mine.id}/${what}`);
      bus.dispatchEvent(new CustomEvent("changed", { detail: mine.id })); // this one hears it too
    } catch (problem) {
      showProblem(mine, problem, refresh);
    }
    [cancel.disabled, retry.disabled] = [false, false];
  }

  // Show the video as soon as it is there.
  function showVideo() {
    if (player.isOpen()) return;
    const { status, frames } = job;
    if (isUpload(status) || status.stage === "describing" || status.status === "completed" || frames.length) {
      player.open(`${base}/api/jobs/${job.id}/video`);
    } else
      player.say(isFinished(status) ? "The video did not arrive." : "The video appears here once it is downloaded.");
  }

  // The user has taken over: the player does not go to the newest frame any more.
  function touch() {
    if (job) job.isLive = false;
  }

  // The player's time -> the frame of that moment.
  function moment() {
    const ms = player.ms();
    const { frames, current } = job;
    if (ms === null) select(frames.length ? Math.max(0, current) : -1);
    else select(bisect(frames, (frame) => frame.timestamp_ms <= ms + 0.5) - 1);
  }

  function pick(frame, isUser = true) {
    if (isUser) touch();
    player.seek(frame);
    select(
      bisect(job.frames, (other) => other.frame_idx < frame.frame_idx),
      true,
    );
  }

  function select(index, isAsked = false) {
    const frame = job.frames[index];
    if (job.current === index && job.shown === frame?.seq && !isAsked) return;
    job.current = index;
    job.shown = frame?.seq;
    time.textContent = frame ? clock(frame.timestamp_ms) : "";
    const original = job.byIdx.get(frame?.reused_from_frame_idx);
    if (original) time.textContent += ` · looks like ${clock(original.timestamp_ms)}`;
    text.textContent = frame ? textOf(frame) || "(no text)" : "";
    text.classList.toggle("mr-error", frame?.status === "error");
    player.show(frame ?? null);
    list.show(frame ? job.groups[bisect(job.groups, (group) => group.start <= index) - 1] : null, isAsked);
    strip.show(index, isAsked);
  }

  function isPlayKey(event) {
    if (!job || !shortcuts.checked || !section.getClientRects().length || !event.target.closest) return false;
    if (event.target.closest(".mr-row, .mr-tile")) return true; // Enter chooses these
    return !event.target.closest("button, a, summary, input, textarea, select, video, [contenteditable], [role=tab]");
  }

  function onKey(event) {
    if (!job?.frames.length || !section.getClientRects().length || event.ctrlKey || event.metaKey || event.altKey)
      return;
    if (
      event.defaultPrevented ||
      event.target.closest?.("input:not([type=checkbox]), textarea, select, pre, [contenteditable], [role=tab]")
    )
      return;
    const last = job.frames.length - 1;
    const to = { ArrowLeft: job.current - 1, ArrowRight: job.current + 1, Home: 0, End: last }[event.key];
    if (to !== undefined) pick(job.frames[Math.max(0, Math.min(last, to))]);
    else if (event.key === "/" && shortcuts.checked) list.focusSearch();
    else if (event.key === " " && isPlayKey(event)) player.toggle();
    else return;
    event.preventDefault();
  }

  return { open, close };
}
