// A job in words: its video's name, how far it is, and how to do the same from code.

const DEFAULTS = {
  caption_length: null,
  start_s: 0,
  end_s: null,
  max_frames: null,
  max_tokens: 256,
  temperature: 0,
  reuse_similar: 10,
};
const isFinished = (status) => ["completed", "failed", "canceled"].includes(status.status);
const isUpload = (status) => status.video_url.startsWith("upload:");

// "upload:holiday.mp4" or "https://example.com/a/holiday.mp4?…" -> "holiday.mp4"; of a bare host, the host.
function videoName(job) {
  if (isUpload(job)) return job.video_url.slice("upload:".length);
  const [host, ...parts] = job.video_url.replace(/^[a-z]+:\/\//i, "").replace(/[?#].*$/, "").split("/").filter(Boolean);
  const last = parts.at(-1) ?? host ?? job.video_url;
  try {
    return decodeURIComponent(last);
  } catch {
    return last;
  }
}

// What is asked of each frame.
function askedText(job) {
  return job.caption_length ? `Captions, ${job.caption_length}` : job.input_question;
}

// What the job does, as parts of a line.
function progressParts(status) {
  const count = (number) => number.toLocaleString("en");
  const [num, expected] = [status.frames_processed, status.total_frames_expected];
  const parts = [];
  if (status.status === "submitted") {
    const ahead = status.queue_position;
    parts.push("Waiting");
    if (ahead !== null && ahead !== undefined) {
      parts.push(ahead === 0 ? "next in the queue" : `${ahead} job${ahead === 1 ? "" : "s"} ahead`);
    }
  } else if (status.status === "processing") {
    parts.push({ downloading: "Downloading", describing: "Describing" }[status.stage] ?? "Starting");
    if (status.stage === "downloading" && status.bytes_downloaded)
      parts.push(`${(status.bytes_downloaded / 1e6).toFixed(1)} MB`);
  } else {
    parts.push({ completed: "Done", failed: "Failed", canceled: "Canceled" }[status.status]);
  }
  const isWhole = status.status === "completed" || expected === null;
  if (num || status.stage === "describing")
    parts.push(isWhole ? `${count(num)} frames` : `${count(num)} of ${count(expected)} frames`);
  if (status.frames_reused) parts.push(`${count(status.frames_reused)} look alike`);
  if (status.frames_failed) parts.push(`${count(status.frames_failed)} with errors`);
  if (status.stage === "describing" && status.frames_per_second)
    parts.push(`${status.frames_per_second.toFixed(1)} frames/s`);
  if (status.stage === "describing" && status.eta_seconds) parts.push(`${duration(status.eta_seconds)} left`);
  return parts;
}

// What the job was asked, as the API takes it; defaults are left out.
function optionsOf(status) {
  if (status.source_job_id) return { question: status.input_question }; // the rest is as in this job
  const asked = { target_fps: status.input_target_fps, question: status.input_question };
  for (const [name, usual] of Object.entries(DEFAULTS)) if (status[name] !== usual) asked[name] = status[name];
  if (asked.caption_length) delete asked.question;
  return asked;
}

// Examples for curl and Python, with what exactly this job was asked -> [name, text] of each.
function codeFor(status) {
  const asked = optionsOf(status);
  const quoted = (text) => `'${String(text).replaceAll("'", `'\\''`)}'`;
  const file = videoName(status);
  const python = JSON.stringify;
  const fields = Object.entries(asked).map(([name, value]) => `${python(name)}: ${python(value)}`);
  let [curl, send] = ["", ""];
  if (status.source_job_id) {
    const path = `/api/jobs/${status.job_id}/ask`;
    curl = `curl --json ${quoted(JSON.stringify(asked))} \\\n  ${base}${path}`;
    send = `job = api.post(${python(path)}, json=options).raise_for_status().json()`;
  } else if (isUpload(status)) {
    const parts = Object.entries(asked).map(([name, value]) => ` \\\n  --form-string ${quoted(`${name}=${value}`)}`);
    const path = file.replace(/(["\\])/g, "\\$1");
    curl = `curl ${base}/api/upload -F ${quoted(`file=@"${path}"`)}${parts.join("")}`;
    send = `with open(${python(file)}, "rb") as video:\n    job = api.post("/api/upload", files={"file": video}, data=options).raise_for_status().json()`;
  } else {
    fields.unshift(`"video_url": ${python(status.video_url)}`);
    curl = `curl --json ${quoted(JSON.stringify({ video_url: status.video_url, ...asked }))} \\\n  ${base}/api/submit`;
    send = `job = api.post("/api/submit", json=options).raise_for_status().json()`;
  }
  const results = `# the results of this job\ncurl ${base}/api/status/${status.job_id}\ncurl ${base}/api/jobs/${status.job_id}/export?format=jsonl`;
  const program = `import time
import httpx  # pip install httpx

api = httpx.Client(base_url=${python(base)}, timeout=60)  # where keys are set: headers={"Authorization": "Bearer KEY"}
options = {${fields.map((field) => `\n    ${field},`).join("")}\n}
${send}
job_id = job["job_id"]  # this job's: ${python(status.job_id)}
while (job := api.get(f"/api/status/{job_id}").json())["status"] in ("submitted", "processing"):
    time.sleep(2)
for frame in job["results_payload"]["frame_results"]:
    print(frame["timestamp_ms"] / 1000, frame["description"])`;
  return [
    ["curl", `# submit the same again\n${curl}\n\n${results}`],
    ["Python", program],
  ];
}

// The examples as nodes, with copy buttons. speak(words): tells screen readers.
function codeNodes(status, speak) {
  async function copyText(shown, button) {
    window.getSelection().selectAllChildren(shown);
    const isCopied = await navigator.clipboard?.writeText(shown.textContent).then(
      () => true,
      () => false,
    );
    const isDone = isCopied || document.execCommand("copy"); // pages without HTTPS have no clipboard
    button.textContent = isDone ? "Copied" : "Press Ctrl+C";
    speak(button.textContent);
    window.setTimeout(() => (button.textContent = "Copy"), 2500);
  }

  const example = ([name, written]) => {
    const shown = node(
      "pre",
      { tabindex: 0, role: "region", "aria-label": `${name} example` },
      node("code", {}, written),
    );
    const copy = node(
      "button",
      { type: "button", "aria-label": `Copy the ${name} example`, onclick: () => copyText(shown, copy) },
      "Copy",
    );
    return node("div", {}, node("div", { class: "mr-code-head" }, node("h3", {}, name), copy), shown);
  };
  return codeFor(status).map(example);
}
