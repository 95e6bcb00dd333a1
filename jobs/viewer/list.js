// The searchable list of descriptions. Only the rows in sight are in the document: their heights are guessed first,
// measured once they are shown, and remembered; what is in sight stays where it is when a guess above it was wrong.

const LIST_ROW_GUESS_PX = 58;
const LIST_ROWS_TO_GUESS = 100; // whose heights are enough for a good guess
const LIST_ROWS_BEYOND = 6; // drawn above and below what is in sight
const FOLLOW_PAUSE_MS = 5000; // a box stays where the user scrolled it for so long
const calm = window.matchMedia("(prefers-reduced-motion: reduce)");

// Scrolls a box towards what `target()` says, unless the user has scrolled it just now.
function follower(box, property, onUserScroll) {
  let pausedUntil = 0;
  let glide = 0;
  const stop = () => {
    window.cancelAnimationFrame(glide);
    glide = 0;
  };
  const pause = () => {
    stop();
    pausedUntil = Date.now() + FOLLOW_PAUSE_MS;
    onUserScroll();
  };
  for (const type of ["wheel", "touchmove"]) box.addEventListener(type, pause, { passive: true });
  box.addEventListener("pointerdown", (event) => event.target === box && pause()); // its scrollbar
  box.addEventListener("keydown", (event) => ["PageUp", "PageDown"].includes(event.key) && pause());
  box.addEventListener("scroll", () => {
    if (Date.now() < pausedUntil) pausedUntil = Date.now() + FOLLOW_PAUSE_MS; // it still rolls on
  });

  function step(target) {
    const before = box[property];
    const way = target() - before;
    if (Math.abs(way) < 1) return stop();
    box[property] = before + Math.sign(way) * Math.min(Math.abs(way), Math.max(1.5, Math.abs(way) * 0.22));
    if (box[property] === before) return stop(); // at its end
    glide = window.requestAnimationFrame(() => step(target));
  }

  return {
    stop,
    follow(target, isAsked = false) {
      if (isAsked) pausedUntil = 0;
      if (Date.now() < pausedUntil) return;
      stop();
      const isFar =
        Math.abs(target() - box[property]) > (property === "scrollTop" ? box.clientHeight : box.clientWidth);
      if (calm.matches || isFar || document.hidden) box[property] = target();
      else step(target);
    },
  };
}

function textOf(frame) {
  return frame.status === "error"
    ? `Error: ${frame.error_message ?? "this frame could not be described"}`
    : frame.description;
}

// Frames in a row that show the same -> groups; start: the first's index.
function fold(frames) {
  const groups = [];
  let group;
  frames.forEach((frame, start) => {
    const text = textOf(frame);
    const isError = frame.status === "error";
    if (!group || group.text !== text || group.isError !== isError) {
      groups.push((group = { start, first: frame, last: frame, count: 0, text, isError }));
    }
    group.last = frame;
    group.count += 1;
  });
  return groups;
}

// section: where it goes. onPick(frame): a row was chosen. onUserScroll(): the user looks around.
// Groups are {first, last, count, text, isError}: frames in a row that show the same, see fold.
function mountList(section, onPick, onUserScroll) {
  let groups = [];
  let rows = []; // the groups that match the search
  let words = [];
  let current = null; // first.frame_idx of the row of the player's frame
  let focused = null; // of the row that has the focus
  let offsets = new Float64Array(1);
  let guess = LIST_ROW_GUESS_PX;
  let width = 0;
  let request = 0;
  const heights = new Map(); // by first.frame_idx, as all keys here
  const drawn = new Map();

  const search = node("input", {
    type: "search",
    "aria-label": "Search descriptions",
    placeholder: "Search descriptions",
    autocomplete: "off",
    oninput: sift,
    onkeydown: searchKey,
  });
  const matches = node("span", { class: "mr-matches", role: "status" });
  const items = node("ol", { class: "mr-rows", role: "list", "aria-label": "Descriptions" });
  const empty = node("p", { class: "mr-empty mr-soft" });
  const box = node("div", { class: "mr-list-box" }, empty, items);
  const scroll = follower(box, "scrollTop", onUserScroll);
  section.replaceChildren(node("div", { class: "mr-search" }, search, matches), box);

  box.addEventListener("scroll", later, { passive: true });
  items.addEventListener("keydown", rowKey);
  items.addEventListener("focusin", (event) => (focused = keyOf(event.target)));
  items.addEventListener("focusout", () => (focused = null));
  new ResizeObserver(() => {
    if (!box.clientWidth) return;
    if (box.clientWidth !== width) heights.clear();
    width = box.clientWidth;
    place();
    draw();
  }).observe(box);

  const key = (group) => group.first.frame_idx;
  const keyOf = (target) => Number(target.closest("li").dataset.key);
  const top = (target) => offsets[Math.min(target, rows.length)];

  function indexOf(wanted) {
    const at = bisect(rows, (group) => key(group) <= wanted) - 1;
    return at >= 0 && key(rows[at]) === wanted ? at : -1;
  }

  function later() {
    request ||= window.requestAnimationFrame(draw);
  }

  function filter() {
    words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const sought = (group) => (
      (group.lower ??= group.text.toLowerCase()),
      words.every((word) => group.lower.includes(word))
    );
    rows = words.length ? groups.filter(sought) : groups;
    const num = rows.length;
    matches.textContent = words.length ? (num === 1 ? "1 match" : `${num.toLocaleString("en")} matches`) : "";
    empty.textContent = words.length ? "No description matches." : "No descriptions yet.";
    empty.hidden = num > 0;
    place();
    draw();
  }

  // The user has changed the search: the matches from the top, or all again, around the current row.
  function sift() {
    box.scrollTop = 0;
    filter();
    if (!words.length) reveal(true);
  }

  function reveal(isAsked) {
    const at = current === null ? -1 : indexOf(current);
    if (at < 0) return;
    const target = () =>
      Math.max(0, Math.min(offsets[rows.length] - box.clientHeight, top(at) - 0.3 * box.clientHeight));
    const [above, below] = [top(at) - box.scrollTop, box.scrollTop + box.clientHeight - top(at + 1)];
    if (above < 0 || below < 0.2 * box.clientHeight) scroll.follow(target, isAsked);
  }

  function searchKey(event) {
    if (event.key === "Enter" && rows.length) {
      const after = rows.findIndex((group) => current !== null && key(group) > current);
      onPick(rows[words.length && after > 0 ? after : 0].first); // the next match, or the first again
    } else if (event.key === "Escape" && search.value) {
      search.value = "";
      sift();
    } else if (event.key === "ArrowDown" && rows.length) {
      event.preventDefault();
      focusRow(Math.max(0, indexOf(current)));
    }
  }

  function rowKey(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    focusRow(Math.min(rows.length - 1, Math.max(0, indexOf(keyOf(event.target)) + step)));
  }

  function focusRow(at) {
    onUserScroll();
    scroll.stop();
    focused = key(rows[at]);
    const [start, end] = [top(at), top(at + 1)];
    if (start < box.scrollTop) box.scrollTop = start;
    else if (end > box.scrollTop + box.clientHeight) box.scrollTop = end - box.clientHeight;
    draw();
    drawn.get(key(rows[at]))?.firstChild.focus({ preventScroll: true });
  }

  // Where each row begins, by what is known of the heights. `draw` makes the list as high as that.
  function place() {
    if (heights.size && heights.size < LIST_ROWS_TO_GUESS) {
      guess = [...heights.values()].reduce((sum, height) => sum + height, 0) / heights.size;
    }
    if (offsets.length !== rows.length + 1) offsets = new Float64Array(rows.length + 1);
    rows.forEach((group, at) => (offsets[at + 1] = offsets[at] + (heights.get(key(group)) ?? guess)));
  }

  function draw() {
    window.cancelAnimationFrame(request);
    request = 0;
    if (!width) return;
    const height = box.clientHeight;
    const within = (y) => Math.max(0, Math.min(offsets[rows.length] - height, y));
    const shown = box.scrollTop;
    let y = within(shown); // set at the end: whatever changes before the rows are measured costs another layout
    for (let pass = 0; pass < 4; pass += 1) {
      const first = bisect(offsets, (offset) => offset <= y) - 1;
      const end = bisect(offsets, (offset) => offset < y + height);
      drawRows(Math.max(0, first - LIST_ROWS_BEYOND), Math.min(rows.length, end + LIST_ROWS_BEYOND));
      const before = top(first);
      const isAtEnd = y > 0 && y + height >= offsets[rows.length] - 1;
      if (!measure()) break;
      place();
      y = within(isAtEnd ? Infinity : y + top(first) - before);
    }
    items.style.height = `${offsets[rows.length]}px`;
    if (y !== shown) box.scrollTop = y;
    for (const [at, item] of drawn) item.style.transform = `translateY(${top(indexOf(at))}px)`;
  }

  function drawRows(first, end) {
    const stop = [focused, current].find((wanted) => wanted !== null && indexOf(wanted) >= 0); // where Tab leads
    const tabAt = stop === undefined ? first : indexOf(stop);
    const wanted = rows.slice(first, end);
    if (tabAt < first) wanted.unshift(rows[tabAt]);
    else if (tabAt >= end && rows.length) wanted.push(rows[tabAt]);
    const keys = new Set(wanted.map(key));
    for (const [at, item] of drawn) {
      if (keys.has(at)) continue;
      drawn.delete(at);
      item.remove();
    }
    let next = items.firstChild;
    for (const group of wanted) {
      let item = drawn.get(key(group));
      if (!item) drawn.set(key(group), (item = makeRow(group)));
      fill(item, group);
      item.firstChild.tabIndex = group === rows[tabAt] ? 0 : -1;
      if (item === next) next = next.nextSibling;
      else items.insertBefore(item, next);
    }
  }

  function makeRow(group) {
    const pick = () => onPick(rows[indexOf(key(group))]?.first ?? group.first);
    const button = node("button", { type: "button", class: "mr-row", onclick: pick });
    for (const part of ["mr-time", "mr-text", "mr-count"]) button.append(node("span", { class: part }));
    return node("li", { "data-key": key(group) }, button);
  }

  function fill(item, group) {
    const button = item.firstChild;
    if (key(group) === current) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
    item.setAttribute("aria-setsize", rows.length);
    item.setAttribute("aria-posinset", indexOf(key(group)) + 1);
    const state = `${group.last.frame_idx} ${words.join(" ")} ${group.text}`;
    if (item.shown === state) return;
    item.shown = state;
    const [time, text, count] = button.children;
    time.textContent = clock(group.first.timestamp_ms);
    if (clock(group.last.timestamp_ms) !== time.textContent)
      time.append(node("br"), `– ${clock(group.last.timestamp_ms)}`);
    button.classList.toggle("mr-row-error", group.isError);
    text.replaceChildren(...marked(group.text || "(no text)"));
    count.textContent = group.count > 1 ? countText(group.count, "frame") : "";
  }

  // The text as nodes, with what is searched for marked.
  function marked(text) {
    if (!words.length) return [text];
    const pattern = words
      .map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"))
      .sort((a, b) => b.length - a.length);
    const parts = text.split(new RegExp(`(${pattern.join("|")})`, "gi")); // every second one is a match
    return parts.map((part, at) => (at % 2 ? node("mark", {}, part) : part));
  }

  function measure() {
    let isChanged = false;
    for (const [at, item] of drawn) {
      const height = item.offsetHeight;
      if (heights.get(at) === height) continue;
      heights.set(at, height);
      isChanged = true;
    }
    return isChanged;
  }

  return {
    clear() {
      groups = [];
      current = null;
      search.value = "";
      heights.clear();
      drawn.clear();
      items.replaceChildren();
      box.scrollTop = 0;
      filter();
    },
    update(all) {
      groups = all;
      filter();
    },
    show(group, isAsked) {
      current = group ? key(group) : null;
      draw();
      reveal(isAsked);
    },
    focusSearch() {
      search.focus();
      search.select();
    },
  };
}

// How many of the sorted items come before the first that `isBefore` says no to.
function bisect(items, isBefore) {
  let [low, high] = [0, items.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (isBefore(items[middle])) low = middle + 1;
    else high = middle;
  }
  return low;
}
