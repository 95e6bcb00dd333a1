// The player: the job's video, with the descriptions as captions. Where the browser cannot play it, it shows the
// frames' pictures.

const CAPTIONS_KEY = "moonreel-captions";

// stage, captions: the box and the checkbox. picture(frame): the address of its picture. onMoment(): the time may have
// changed, or be unknown now. onPlay(): the user has begun to watch.
function mountPlayer(stage, captions, picture, onMoment, onPlay) {
  let video = null;
  let track = null;
  let cues = [];
  let shown = null; // the frame of the moment
  let timer = 0;
  let isPictures = false;
  const image = node("img", { class: "mr-picture", alt: "", hidden: true, onerror: () => (image.hidden = true) });
  const note = node("p", { class: "mr-stage-note", hidden: true });
  stage.replaceChildren(image, note);
  remember(captions, CAPTIONS_KEY);
  captions.addEventListener("change", () => {
    if (track) track.mode = captions.checked ? "showing" : "hidden";
  });

  function say(text) {
    note.textContent = text;
    note.hidden = !text;
  }

  function open(url) {
    const made = node("video", {
      class: "mr-video",
      controls: true,
      playsinline: true,
      preload: "auto",
      "aria-label": "The video",
    });
    video = made;
    track = made.addTextTrack("captions", "Descriptions", "en");
    track.mode = captions.checked ? "showing" : "hidden";
    made.textTracks.addEventListener("change", () => video === made && (captions.checked = track.mode === "showing"));
    const on = (type, react) => made.addEventListener(type, () => video === made && !isPictures && react());
    on("error", showPictures);
    on("loadedmetadata", () => {
      if (!made.videoWidth)
        showPictures(); // it has sound only, or its pictures cannot be decoded
      else if (shown) seek(shown);
    });
    on("timeupdate", onMoment);
    on("seeked", onMoment);
    on("play", () => {
      onPlay();
      window.clearInterval(timer);
      timer = window.setInterval(onMoment, 100); // timeupdate alone comes late
    });
    on("pause", () => window.clearInterval(timer));
    made.src = url;
    stage.prepend(made);
    say("");
  }

  function showPictures() {
    isPictures = true;
    window.clearInterval(timer);
    video.remove();
    say("This browser cannot play the video. Its described frames are shown instead.");
    show(shown);
    onMoment();
  }

  function close() {
    window.clearInterval(timer);
    if (video) {
      video.removeAttribute("src"); // gives up its connection
      video.load();
      video.remove();
    }
    [video, track, cues, shown, isPictures, image.hidden] = [null, null, [], null, false, true];
    say("");
  }

  function seek(frame) {
    if (video?.readyState && !isPictures) video.currentTime = (frame.timestamp_ms + 1) / 1000; // 1: ms are rounded
  }

  function show(frame) {
    shown = frame;
    if (!isPictures || !frame) return;
    image.hidden = false;
    image.src = picture(frame);
  }

  // A caption per group; the last one until the end.
  function caption(groups, durationS) {
    if (!track) return;
    let num = 0;
    groups.forEach((group, at) => {
      if (group.isError || !group.text) return;
      const startTime = group.first.timestamp_ms / 1000;
      const next = groups[at + 1];
      const end = next ? next.first.timestamp_ms / 1000 - 0.001 : (durationS ?? 0); // two would show at the boundary
      const text = group.text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
      const cue = { startTime, endTime: end > startTime ? end : startTime + (next ? 0.001 : 2), text };
      if (num === cues.length) {
        cues.push(new VTTCue(cue.startTime, cue.endTime, cue.text));
        track.addCue(cues[num]);
      } else {
        for (const name in cue) if (cues[num][name] !== cue[name]) cues[num][name] = cue[name];
      }
      num += 1;
    });
    for (const cue of cues.splice(num)) track.removeCue(cue);
  }

  return {
    open,
    close,
    say,
    seek,
    show,
    caption,
    isOpen: () => video !== null,
    ms: () => (video?.readyState && !isPictures ? video.currentTime * 1000 : null), // null: it follows the list
    toggle() {
      if (!video || isPictures) return;
      if (video.paused) video.play().catch(() => {});
      else video.pause();
    },
  };
}
