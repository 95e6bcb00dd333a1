// The page as a whole: which view is shown, the job in the address, the log-in, and whether the server is ready.

const form = mountForm(page.querySelector("[data-form]"));
const viewer = mountViewer(page.querySelector("[data-viewer]"));
const jobs = mountJobs(page.querySelector("[data-jobs]"));

function go(view) {
  for (const section of page.querySelectorAll("[data-view]")) section.hidden = section.dataset.view !== view;
  for (const button of page.querySelectorAll("[data-go]")) {
    if (button.dataset.go === view) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  }
  if (view === "jobs") jobs.show();
  else jobs.hide();
}

function show(jobId, isNew) {
  go("describe");
  const url = new URL(window.location);
  url.searchParams.set("job", jobId);
  if (isNew && url.href !== window.location.href) window.history.pushState({}, "", url);
  viewer.open(jobId);
}

for (const button of page.querySelectorAll("[data-go]")) button.addEventListener("click", () => go(button.dataset.go));
bus.addEventListener("open", (event) => show(event.detail, true));
bus.addEventListener("leave", leave);
window.addEventListener("popstate", () => showAddressed());

// No job is shown any more: it is gone, or a new one is to be made.
function leave() {
  const url = new URL(window.location);
  url.searchParams.delete("job");
  if (url.href !== window.location.href) window.history.pushState({}, "", url);
  viewer.close();
}

function showAddressed() {
  const jobId = new URL(window.location).searchParams.get("job");
  if (jobId) show(jobId, false);
  else viewer.close();
}

// Say what keeps the server from describing, until nothing does.
async function watchReady() {
  const notice = page.querySelector("[data-notice]");
  try {
    await call("GET", "/api/ready");
    notice.hidden = true;
  } catch (problem) {
    notice.textContent = `${problem.message} Jobs can be submitted, and wait.`;
    if (problem.code === "offline") notice.textContent = problem.message;
    notice.hidden = false;
  }
  window.setTimeout(watchReady, notice.hidden ? 30000 : 2000);
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
}

bus.addEventListener("login", askForKey);
showAddressed();
watchReady();
call("GET", "/api/jobs/list?limit=1").catch(() => {}); // shows the log-in where one is needed
