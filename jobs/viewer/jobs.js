// The history of jobs, newest first. While it is shown and a job waits or runs, it asks again every 3 s and updates its
// rows in place, so that focus and scrolling stay. Searches in the rows that are loaded; statuses the server filters.

const REFRESH_MS = 3000;
const ROWS_AT_ONCE = 20;
const MOST_AT_ONCE = 100; // the API's limit
const STATUSES = { // as people read them, with a mark beside the colour
  submitted: ["Waiting", "◷"],
  processing: ["Running", "▶"],
  completed: ["Completed", "✓"],
  failed: ["Failed", "✕"],
  canceled: ["Canceled", "■"],
};

function countText(count, noun) {
  return `${count.toLocaleString()} ${noun}${count === 1 ? "" : "s"}`;
}

// "83", "1:23" or "0:01:23.5" -> seconds. NaN if it is none of these.
function readSeconds(text) {
  const match = /^(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?)$/.exec(text.trim());
  if (!match) return NaN;
  const [hours, minutes, seconds] = [Number(match[1] ?? 0), Number(match[2] ?? 0), Number(match[3])];
  if ((match[1] && minutes >= 60) || (match[2] && seconds >= 60)) return NaN;
  return hours * 3600 + minutes * 60 + seconds;
}

// 1234567 -> "1.2 MB"
function byteText(numBytes) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (numBytes >= 999.5 && unit < units.length - 1) [numBytes, unit] = [numBytes / 1000, unit + 1];
  return `${numBytes.toFixed(unit && numBytes < 9.95 ? 1 : 0)} ${units[unit]}`;
}

function isActive(job) {
  return job.status === "submitted" || job.status === "processing";
}

// One job of the list: {li, job, update(job), matches(text), focus()}. Its buttons call onGone() and onChanged(job).
function jobRow(first, onChanged, onGone) {
  const row = { job: first };
  const name = videoName(first);
  const asked = askedText(first);
  const path = `/api/jobs/${encodeURIComponent(first.job_id)}`;
  const image = node("img", { alt: "", loading: "lazy", hidden: true, onclick: () => openJob(first.job_id) });
  const mark = node("span", { "aria-hidden": "true" });
  const [state, status] = [node("span", {}), node("span", { class: "mr-status" })];
  const bar = node("progress", { max: 100, "aria-label": `Progress of ${name}` });
  const [facts, reason] = [node("p", { class: "mr-soft" }), node("p", { class: "mr-error" })];
  const error = node("p", { class: "mr-error", role: "alert" });
  const button = (text, onclick) => node("button", { type: "button", onclick, "aria-label": `${text} ${name}` }, text);
  const open = button("Open", () => openJob(first.job_id));
  const retry = button("Retry", () => change("POST", "/retry"));
  const cancel = button("Cancel", () => change("POST", "/cancel"));
  const remove = button("Delete", () => ask(true));
  const no = button("No", () => ask(false));
  const yes = button("Yes", () => change("DELETE", ""));
  yes.setAttribute("aria-label", `Yes, delete ${name}`);
  no.setAttribute("aria-label", `No, keep ${name}`);
  const actions = node("div", { class: "mr-jobs-actions" }, open, retry, cancel, remove);
  const sure = node("div", { class: "mr-jobs-actions", role: "group", "aria-label": `Delete ${name}?`, hidden: true });
  sure.append(node("span", { class: "mr-jobs-sure" }, "Delete?"), yes, no);
  sure.addEventListener("keydown", (event) => event.key === "Escape" && ask(false));
  let busy = false;
  let picture = null; // "frames/0.jpg", then perhaps another; none is asked for before a frame is described

  status.append(mark, state);
  row.li = node(
    "li",
    { class: "mr-card mr-jobs-row" },
    node("div", { class: "mr-jobs-picture" }, image),
    node("div", { class: "mr-jobs-text" }, node("h3", { title: name }, name), node("p", { class: "mr-jobs-question" },
      asked), facts, reason),
    node("div", { class: "mr-jobs-state" }, status, bar),
    node("div", { class: "mr-jobs-end" }, actions, sure, error),
  );

  function ask(isAsked) {
    [actions.hidden, sure.hidden] = [isAsked, !isAsked];
    (isAsked ? no : remove).focus();
  }

  async function change(method, end) {
    if (busy) return;
    busy = true;
    error.textContent = "";
    try {
      const job = await call(method, path + end);
      if (job) row.update(job);
      if (job) onChanged(row);
      else onGone(row);
    } catch (problem) {
      if (problem.code === "job_not_found") return onGone(row);
      if (method === "DELETE") ask(false);
      error.textContent = problem.message;
    } finally {
      busy = false;
    }
  }

  // The picture of frame 0; if that is not described, of the first one that is.
  async function findPicture() {
    if (picture) return;
    picture = "/frames/0.jpg";
    image.addEventListener("load", () => (image.hidden = false));
    image.addEventListener("error", async () => {
      image.hidden = true;
      if (picture !== "/frames/0.jpg") return;
      const page = await call("GET", `${path}/frames?limit=1`).catch(() => null);
      if (!page?.frames.length) return;
      picture = `/frames/${page.frames[0].frame_idx}.jpg`;
      image.src = base + path + picture;
    });
    image.loading = "eager"; // a hidden one would never load lazily
    image.src = base + path + picture;
  }

  function tell(job) {
    const expected = job.total_frames_expected;
    const done = job.frames_processed.toLocaleString();
    const isWhole = job.status === "completed" || expected === null;
    const frames = isWhole ? countText(job.frames_processed, "frame") : `${done} of ${countText(expected, "frame")}`;
    const date = new Date(job.submitted_at * 1000);
    const when = date.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
    const parts = [
      node("time", { datetime: date.toISOString() }, when),
      job.duration_s === null ? null : `${clock(job.duration_s * 1000).replace(/\.0$/, "")} long`,
      `${job.input_target_fps} fps`,
      job.frames_processed || expected ? frames : null,
      job.frames_failed ? `${job.frames_failed.toLocaleString()} with errors` : null,
    ].filter(Boolean);
    facts.replaceChildren(...parts.flatMap((part, i) => (i ? [" · ", part] : [part])));
  }

  row.update = (job) => {
    const shown = JSON.stringify(job);
    if (shown === row.shown) return;
    Object.assign(row, { job, shown });
    const [text, sign] = STATUSES[job.status];
    const percent = job.status === "processing" && job.frames_processed ? ` ${Math.floor(job.progress)}%` : "";
    state.textContent = job.stage === "downloading" && isActive(job) ? "Downloading" : text + percent;
    mark.textContent = sign;
    status.dataset.status = job.status;
    bar.hidden = job.status !== "processing";
    bar.value = job.progress;
    reason.textContent = job.error_message ?? "";
    tell(job);
    if (job.frames_processed) findPicture();
    const focused = actions.contains(document.activeElement) ? document.activeElement : null;
    retry.hidden = job.status !== "failed" && job.status !== "canceled";
    cancel.hidden = !isActive(job);
    remove.hidden = isActive(job);
    if (focused?.hidden) open.focus();
  };
  row.matches = (text) => `${name}\n${asked}\n${first.job_id}`.toLowerCase().includes(text);
  row.focus = () => open.focus();
  row.update(first);
  return row;
}

function mountJobs(section) {
  const rows = new Map(); // by job_id, in the order of the list
  let [isShown, timer, cursor, total, filter] = [false, 0, null, 0, ""];
  let asked = 0; // counts requests for the list: an answer that another has overtaken is dropped

  const search = node("input", { type: "search", placeholder: "Name or question", oninput: showMatches });
  search.setAttribute("aria-label", "Search the loaded jobs");
  const choices = Object.entries(STATUSES).map(([value, [text]]) => node("option", { value }, text));
  const select = node("select", { onchange: choose }, node("option", { value: "" }, "All"), ...choices);
  select.setAttribute("aria-label", "Status");
  const count = node("p", { class: "mr-soft", role: "status" });
  const heading = node("h2", { tabindex: -1 }, "Jobs");
  const error = node("p", { class: "mr-error", role: "alert" });
  const list = node("ul", { class: "mr-jobs-list" });
  const emptyText = node("p", {});
  const start = node("button", { type: "button", class: "mr-primary", onclick: toForm }, "Describe a video");
  const empty = node("div", { class: "mr-card mr-jobs-empty", hidden: true }, emptyText, start);
  const more = node("button", { type: "button", class: "mr-jobs-more", hidden: true, onclick: loadMore }, "Load more");
  section.append(
    node("div", { class: "mr-jobs-head" }, heading, count, search, select),
    error, list, empty, more,
  );

  function toForm() {
    page.querySelector('[data-go="describe"]').click();
    page.querySelector('[data-go="describe"]').focus();
  }

  async function ask(limit, from) {
    const query = new URLSearchParams({ limit, status_filter: filter, cursor: from ?? "" });
    return call("GET", `/api/jobs/list?${query}`);
  }

  // Ask for as many rows as are loaded, and put what came into place.
  async function refresh() {
    window.clearTimeout(timer);
    const number = ++asked;
    try {
      const wanted = Math.max(ROWS_AT_ONCE, rows.size);
      let found = [];
      let answer = { next_cursor: null };
      do {
        answer = await ask(Math.min(MOST_AT_ONCE, wanted - found.length), answer.next_cursor);
        if (number !== asked) return;
        found = found.concat(answer.jobs);
      } while (answer.next_cursor && found.length < wanted);
      place(found, answer, false);
    } catch (problem) {
      if (number !== asked) return;
      error.textContent = problem.message;
    }
    schedule();
  }

  async function loadMore() {
    window.clearTimeout(timer);
    const number = ++asked;
    try {
      const answer = await ask(ROWS_AT_ONCE, cursor);
      if (number !== asked) return;
      const isFirstNew = ({ job_id }) => !rows.has(job_id);
      const next = answer.jobs.find(isFirstNew);
      place(answer.jobs, answer, true);
      if (next && more.hidden) rows.get(next.job_id).focus(); // the button that had focus is gone
    } catch (problem) {
      if (number !== asked) return;
      error.textContent = problem.message;
    }
    schedule();
  }

  function schedule() {
    window.clearTimeout(timer);
    const isWaiting = error.textContent || [...rows.values()].some(({ job }) => isActive(job));
    if (isShown && isWaiting) timer = window.setTimeout(refresh, REFRESH_MS);
  }

  // Rows that stay are not moved, as a moved one would lose the focus.
  function place(found, answer, isMore) {
    error.textContent = "";
    [cursor, total] = [answer.next_cursor, answer.total_count];
    const kept = new Set(found.map((job) => job.job_id));
    if (!isMore) for (const row of [...rows.values()]) if (!kept.has(row.job.job_id)) drop(row);
    const ordered = isMore ? [...rows.values()].filter((row) => !kept.has(row.job.job_id)) : [];
    for (const job of found) {
      const row = rows.get(job.job_id) ?? jobRow(job, changed, gone);
      row.update(job);
      ordered.push(row);
    }
    rows.clear();
    ordered.forEach((row, i) => {
      rows.set(row.job.job_id, row);
      if (list.children[i] !== row.li) list.insertBefore(row.li, list.children[i] ?? null);
    });
    showMatches();
  }

  function drop(row) {
    const shown = [...rows.values()].filter((other) => !other.li.hidden);
    const next = shown[shown.indexOf(row) + 1] ?? shown[shown.indexOf(row) - 1];
    const hadFocus = row.li.contains(document.activeElement);
    rows.delete(row.job.job_id);
    row.li.remove();
    if (hadFocus) (next ?? { focus: () => heading.focus() }).focus();
  }

  function gone(row) {
    drop(row);
    total -= 1;
    showMatches();
    changed(row);
  }

  function changed(row) {
    asked += 1; // a list that was asked for before this change is old
    bus.dispatchEvent(new CustomEvent("changed", { detail: row.job.job_id }));
  }

  function showMatches() {
    const text = search.value.trim().toLowerCase();
    let numShown = 0;
    for (const row of rows.values()) {
      row.li.hidden = Boolean(text) && !row.matches(text);
      if (!row.li.hidden) numShown += 1;
    }
    const loaded = rows.size < total ? `${rows.size} of ${countText(total, "job")}` : countText(total, "job");
    say(count, text ? `${numShown} found in ${loaded}` : loaded);
    more.hidden = !cursor;
    empty.hidden = numShown > 0;
    start.hidden = Boolean(text || filter);
    const further = cursor ? " Load more to search further." : "";
    if (text) say(emptyText, `Nothing here holds “${search.value.trim()}”.${further}`);
    else if (filter) say(emptyText, `There is no job in the status “${STATUSES[filter][0]}”.`);
    else say(emptyText, "No jobs yet. Choose a video and a question: the job shows up here, and stays.");
  }

  function say(place, text) {
    if (place.textContent !== text) place.textContent = text; // a live region speaks at each change
  }

  function choose() {
    filter = select.value;
    more.hidden = true; // its cursor is of the other list
    refresh();
  }

  bus.addEventListener("changed", () => isShown && refresh());
  return {
    show() {
      isShown = true;
      refresh();
    },
    hide() {
      isShown = false;
      window.clearTimeout(timer);
    },
  };
}
