// A list of any length of which only the lines on the screen are in the document; the page itself scrolls.

const AROUND = 8;
const NEAR_END = 60;

/**
 * Show `items` (an array that its owner changes, and then calls `refresh`) in `host`.
 * `render(item)` returns a line; `onNear` is called when the end comes near.
 */
export function virtualList(host, items, { keyOf, render, onNear, signal }) {
  const drawn = new Map(); // key → {item, element}
  let isDue = false;

  const height = () => parseFloat(getComputedStyle(host).getPropertyValue("--line-height"));

  function draw() {
    isDue = false;
    const line = height();
    host.style.height = `${items.length * line}px`;
    const top = host.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor(-top / line) - AROUND);
    const last = Math.min(items.length, Math.ceil((innerHeight - top) / line) + AROUND);
    const wanted = items.slice(first, last);
    const keys = new Set(wanted.map(keyOf));
    for (const [key, { element }] of drawn) {
      if (keys.has(key)) continue;
      element.remove();
      drawn.delete(key);
    }
    let place = host.firstChild;
    wanted.forEach((item, offset) => {
      const key = keyOf(item);
      let old = drawn.get(key);
      if (old === undefined || old.item !== item) {
        const element = render(item);
        if (old !== undefined) {
          if (place === old.element) place = element;
          const hadFocus = old.element.contains(document.activeElement);
          old.element.replaceWith(element);
          if (hadFocus) element.querySelector("a")?.focus({ preventScroll: true });
        }
        old = { item, element };
        drawn.set(key, old);
      }
      old.element.style.transform = `translateY(${(first + offset) * line}px)`;
      old.element.setAttribute("aria-rowindex", first + offset + 2);
      if (old.element === place) place = place.nextSibling;
      else host.insertBefore(old.element, place);
    });
    if (last > items.length - NEAR_END) onNear();
  }

  function schedule() {
    if (isDue || signal.aborted) return;
    isDue = true;
    requestAnimationFrame(draw);
  }

  addEventListener("scroll", schedule, { passive: true, signal });
  addEventListener("resize", schedule, { passive: true, signal });
  return {
    refresh: schedule,
    /** Move the focus to a line, which is scrolled into view first. */
    focus(index) {
      const line = height();
      const top = host.getBoundingClientRect().top + index * line;
      const head = 120; // the bar and the head of the table
      if (top < head) scrollBy(0, top - head);
      else if (top + line > innerHeight - 8) scrollBy(0, top + line - innerHeight + 8);
      draw();
      drawn.get(keyOf(items[index]))?.element.querySelector("a").focus({ preventScroll: true });
    },
    /** Return the place of the line that has the focus, or -1. */
    focused() {
      return items.findIndex((item) => drawn.get(keyOf(item))?.element.contains(document.activeElement));
    },
    height,
  };
}
