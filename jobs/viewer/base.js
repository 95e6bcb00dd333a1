// What all parts of the page share: the API, DOM nodes, times as text. Everything from a server or a model becomes text
// by textContent, never markup. The files of this folder are joined, in ui.py's order, into one function of `element`.

const page = element.querySelector("[data-page]");
const base = (window.gradio_config?.root ?? window.location.origin + window.location.pathname).replace(/\/+$/, "");
const bus = new EventTarget(); // "open" {detail: job_id}, "changed" {detail: job_id}, "leave": no job is shown,
// "title" {detail: what the open job is called}, "login": a key is needed

class Problem extends Error {
  constructor(status, problem) {
    super(problem.detail ?? `The server answered ${status}.`);
    this.status = status;
    this.code = problem.code ?? "error";
  }
}

// Call the API -> what it answers, as "json", "text" or "blob". Throws Problem, also where the server cannot be reached.
async function call(method, path, body, kind = "json") {
  const options = { method, headers: {} };
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(base + path, options);
    if (answer.ok) return answer.status === 204 ? null : await answer[kind]();
  } catch {
    throw new Problem(0, { detail: "The server cannot be reached. Jobs go on; this page tries again.", code: "offline" });
  }
  if (answer.status === 401) bus.dispatchEvent(new Event("login"));
  throw new Problem(answer.status, await answer.json().catch(() => ({})));
}

// A node: node("button", {type: "button", class: "mr-x", onclick: f, "aria-label": "..."}, "text", child, ...).
function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// 83400 -> "1:23.4"; hours only where there are some.
function clock(ms) {
  const tenths = Math.floor(ms / 100);
  const [hours, minutes, seconds] = [Math.floor(tenths / 36000), Math.floor(tenths / 600) % 60, (tenths % 600) / 10];
  const rest = seconds.toFixed(1).padStart(4, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

// 75 -> "1 min 15 s": how long something still takes.
function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

function openJob(jobId) {
  bus.dispatchEvent(new CustomEvent("open", { detail: jobId }));
}

// A checkbox that is on at first, and then as this browser's user left it.
function remember(checkbox, key) {
  try {
    checkbox.checked = window.localStorage.getItem(key) !== "off";
    checkbox.addEventListener("change", () => window.localStorage.setItem(key, checkbox.checked ? "on" : "off"));
  } catch {
    checkbox.checked = true; // not remembered then
  }
}
