// The page as a whole: which view is shown, by the address (?job=… is a job, ?view=jobs the history of jobs, neither the
// form); the log-in; and whether the server is ready.

const form = mountForm(page.querySelector("[data-form]"));
const viewer = mountViewer(page.querySelector("[data-viewer]"));
const jobs = mountJobs(page.querySelector("[data-jobs]"));
let openId = null; // the job that is open, also behind the history
let openTitle = "";
const logOut = page.querySelector("[data-logout]");

// Show what the address says.
function showAddressed() {
  const asked = new URL(window.location).searchParams;
  const view = asked.get("view") === "jobs" ? "jobs" : "describe";
  for (const section of page.querySelectorAll("[data-view]")) section.hidden = section.dataset.view !== view;
  for (const button of page.querySelectorAll("[data-go]")) {
    if (button.dataset.go === view) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  }
  if (view === "jobs") jobs.show();
  else jobs.hide();
  if (view === "describe") showJob(asked.get("job"));
  retitle();
}

function showJob(jobId) {
  if (openId !== jobId) openTitle = "";
  openId = jobId;
  if (!jobId) {
    form.show();
    viewer.close();
    return;
  }
  form.hide();
  viewer.open(jobId);
}

// Go to another address of the page: {job} or {view}, or {} for the form.
function go(to) {
  const url = new URL(window.location);
  for (const name of ["job", "view"]) {
    if (to[name]) url.searchParams.set(name, to[name]);
    else url.searchParams.delete(name);
  }
  if (url.href !== window.location.href) window.history.pushState({}, "", url);
  showAddressed();
}

function retitle() {
  const isHistory = !page.querySelector("[data-jobs]").hidden;
  document.title = [isHistory ? "Jobs" : openTitle, "Moonreel"].filter(Boolean).join(" · ");
}

page.querySelector('[data-go="jobs"]').addEventListener("click", () => go({ view: "jobs" }));
page.querySelector('[data-go="describe"]').addEventListener("click", () => go({ job: openId }));
bus.addEventListener("open", (event) => go({ job: event.detail }));
bus.addEventListener("title", (event) => {
  openTitle = event.detail;
  retitle();
});
window.addEventListener("popstate", showAddressed);

// No job is open any more: it is gone, or a new one is to be made.
bus.addEventListener("leave", () => {
  const hadFocus = page.querySelector("[data-viewer]").contains(document.activeElement);
  showJob(null);
  if (new URL(window.location).searchParams.get("job")) go({});
  if (hadFocus) form.focus();
});

// Say what keeps the server from describing, until nothing does; and how far that is, where it tells.
async function watchReady() {
  const [notice, spoken] = [page.querySelector("[data-notice]"), page.querySelector("[data-spoken]")];
  const [text, bar] = notice.children;
  let [percent, news, nodes] = [null, "", []];
  try {
    nodes = (await call("GET", "/api/ready")).nodes;
  } catch (problem) {
    percent = /\b(\d+)%/.exec(problem.message)?.[1] ?? null;
    news = percent === null ? problem.message : problem.message.replace(/:.*/, "."); // not the numbers of each second
    text.textContent = problem.message;
    if (problem.code !== "offline") text.textContent += " Jobs can be submitted, and wait.";
    bar.value = percent ?? 0;
  }
  if (spoken.textContent !== news) spoken.textContent = news;
  [notice.hidden, bar.hidden] = [!news, percent === null];
  showNodes(nodes);
  window.setTimeout(watchReady, nodes.length ? 5000 : notice.hidden ? 30000 : percent === null ? 2000 : 1000);
}

// What the nodes of a cluster do, if the model is on one. Nodes that have gone keep their row, for their frames.
function showNodes(nodes) {
  const box = page.querySelector("[data-nodes]");
  const sum = (name) => Number(nodes.reduce((total, one) => total + one[name], 0).toFixed(2)); // GPUs may be shared
  const counted = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;
  const rate = (perSecond) => perSecond.toFixed(1);
  box.hidden = !nodes.length;
  box.querySelector("summary").textContent =
    `Cluster: ${counted(nodes.filter((one) => one.num_instances).length, "node")}, ` +
    `${counted(sum("num_gpus"), "GPU")}, ${counted(sum("num_instances"), "instance")}, ` +
    `${rate(sum("frames_per_second"))} frames/s`;
  const row = (one, index) => {
    const cells = [one.num_instances, one.num_gpus, one.num_frames, rate(one.frames_per_second)];
    return node("tr", {}, node("th", { scope: "row" }, String(index + 1)), ...cells.map((cell) => node("td", {}, String(cell))));
  };
  box.querySelector("tbody").replaceChildren(...nodes.map(row));
}

function askForKey() {
  const section = page.querySelector("[data-login]");
  if (!section.hidden) return;
  const input = node("input", { type: "password", id: "mr-key", autocomplete: "current-password", required: true });
  const error = node("p", { class: "mr-error", role: "alert" });
  const logIn = async (event) => {
    event.preventDefault();
    try {
      await call("POST", "/api/session", { key: input.value });
      noteSession("on");
      window.location.reload();
    } catch (problem) {
      error.textContent = problem.message;
    }
  };
  section.replaceChildren(
    node(
      "form",
      { class: "mr-card", onsubmit: logIn },
      node("label", { for: "mr-key" }, "This server asks for a key"),
      input,
      node("button", { type: "submit", class: "mr-primary" }, "Log in"),
      error,
    ),
  );
  section.hidden = false;
  input.focus();
  noteSession("");
}

// Scripts cannot see the session's cookie: a log-in is noted beside it, for the button to log out again.
function noteSession(isOn) {
  try {
    if (isOn !== undefined) window.localStorage.setItem("moonreel-session", isOn);
    logOut.hidden = !window.localStorage.getItem("moonreel-session");
  } catch {
    logOut.hidden = true; // nothing can be noted
  }
}

logOut.addEventListener("click", async () => {
  await call("DELETE", "/api/session").catch(() => {}); // if it cannot be reached, all stays as it is
  window.location.assign(`${base}/`);
});
bus.addEventListener("login", askForKey);
noteSession();
showAddressed();
watchReady();
call("GET", "/api/jobs/list?limit=1").catch(() => {}); // shows the log-in where one is needed
