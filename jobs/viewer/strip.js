// The film strip: a tile per described frame, of which only those in sight are in the document.

const TILE_PX = 128; // as in viewer.css
const TILE_STEP_PX = TILE_PX + 10;
const TILES_BEYOND = 4;

// section: where it goes. picture(frame): the address of its picture. onPick(frame), onUserScroll(): as in list.js.
function mountStrip(section, picture, onPick, onUserScroll) {
  let frames = [];
  let current = -1;
  let request = 0;
  const drawn = new Map(); // frame_idx -> its <li>
  const items = node("ol", { class: "mr-tiles", role: "list", "aria-label": "Described frames" });
  const box = node("div", { class: "mr-strip-box" }, items);
  const scroll = follower(box, "scrollLeft", onUserScroll);
  section.replaceChildren(box);
  box.addEventListener("scroll", () => (request ||= window.requestAnimationFrame(draw)), { passive: true });
  new ResizeObserver(draw).observe(box);

  function draw() {
    window.cancelAnimationFrame(request);
    request = 0;
    if (!box.clientWidth) return;
    items.style.width = `${Math.max(0, frames.length * TILE_STEP_PX - (TILE_STEP_PX - TILE_PX))}px`;
    const first = Math.max(0, Math.floor(box.scrollLeft / TILE_STEP_PX) - TILES_BEYOND);
    const end = Math.min(frames.length, Math.ceil((box.scrollLeft + box.clientWidth) / TILE_STEP_PX) + TILES_BEYOND);
    const tabAt = current >= 0 ? current : first;
    const wanted = [];
    for (let at = first; at < end; at += 1) wanted.push(at);
    if (tabAt < first) wanted.unshift(tabAt);
    else if (tabAt >= end && frames.length) wanted.push(tabAt);
    const keys = new Set(wanted.map((at) => frames[at].frame_idx));
    const hadFocus = items.contains(document.activeElement);
    for (const [frameIdx, item] of drawn) {
      if (keys.has(frameIdx)) continue;
      drawn.delete(frameIdx);
      item.remove();
    }
    let next = items.firstChild;
    for (const at of wanted) {
      const item = tile(at);
      item.firstChild.tabIndex = at === tabAt ? 0 : -1;
      if (item === next) next = next.nextSibling;
      else items.insertBefore(item, next);
    }
    if (hadFocus && !items.contains(document.activeElement)) focusCurrent();
  }

  function tile(at) {
    const frame = frames[at];
    let item = drawn.get(frame.frame_idx);
    if (!item || item.seq !== frame.seq) {
      const made = makeTile(frame);
      item?.replaceWith(made);
      drawn.set(frame.frame_idx, (item = made));
    }
    item.style.transform = `translateX(${at * TILE_STEP_PX}px)`;
    item.setAttribute("aria-setsize", frames.length);
    item.setAttribute("aria-posinset", at + 1);
    if (at === current) item.firstChild.setAttribute("aria-current", "true");
    else item.firstChild.removeAttribute("aria-current");
    return item;
  }

  function makeTile(frame) {
    const at = clock(frame.timestamp_ms);
    const image = node("img", {
      src: picture(frame),
      alt: "",
      loading: "lazy",
      decoding: "async",
      draggable: "false",
      onerror: () => (image.style.visibility = "hidden"),
    });
    const button = node(
      "button",
      {
        type: "button",
        class: "mr-tile",
        "aria-label": `Frame at ${at}: ${textOf(frame)}`,
        onclick: () => onPick(frame),
      },
      image,
      node("span", { class: "mr-tile-time" }, at),
    );
    if (frame.status === "error") button.classList.add("mr-tile-error");
    const item = node("li", {}, button);
    item.seq = frame.seq;
    return item;
  }

  function focusCurrent() {
    drawn.get(frames[current]?.frame_idx)?.firstChild.focus({ preventScroll: true });
  }

  return {
    clear() {
      frames = [];
      current = -1;
      drawn.clear();
      items.replaceChildren();
      box.scrollLeft = 0;
    },
    update(all) {
      frames = all;
      current = Math.min(current, frames.length - 1);
      draw();
    },
    show(index, isAsked) {
      current = index;
      const hadFocus = items.contains(document.activeElement);
      draw();
      if (index < 0) return;
      if (hadFocus && isAsked) focusCurrent();
      const left = index * TILE_STEP_PX;
      const place = () => {
        const end = Math.max(0, items.offsetWidth - box.clientWidth);
        return Math.max(0, Math.min(end, left - (box.clientWidth - TILE_PX) / 2));
      };
      const isFarIn =
        left - box.scrollLeft > TILE_STEP_PX && left + 2 * TILE_STEP_PX < box.scrollLeft + box.clientWidth;
      if (!isFarIn) scroll.follow(place, isAsked);
    },
  };
}
