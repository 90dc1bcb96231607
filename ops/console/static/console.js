// What a page does beyond links and forms: it keeps the theme, tells times in the reader's zone, and follows what changes.
// Every page works without it.
"use strict";

(() => {
  const root = document.documentElement;
  const remembered = "durable_theme";

  // The theme: as the system has it, until the switch says otherwise. A cookie, so that the server draws the next page right.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  for (const button of document.querySelectorAll("[data-theme-switch]")) {
    const told = () => (root.dataset.theme || (dark.matches ? "dark" : "light"));
    const name = () => button.setAttribute("aria-label", `Theme: ${told()}; switch to ${told() === "dark" ? "light" : "dark"}`);
    button.hidden = false;
    name();
    button.addEventListener("click", () => {
      root.dataset.theme = told() === "dark" ? "light" : "dark";
      document.cookie = `${remembered}=${root.dataset.theme}; path=/; max-age=31536000; samesite=lax`;
      name();
    });
    dark.addEventListener("change", name);
  }

  // Times: the server says them in UTC, the reader has a zone.
  const two = (n) => String(n).padStart(2, "0");
  const local = (at) => `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
  const tellTimes = (within) => {
    for (const time of within.querySelectorAll("time[datetime]")) {
      const at = new Date(time.dateTime);
      if (Number.isNaN(at.getTime())) continue;
      time.title = time.dateTime;
      time.textContent = local(at);
    }
  };
  tellTimes(document);

  // Live parts: the server sends them drawn. One that holds the focus waits for the next time.
  const live = document.querySelector("[data-live]");
  if (!live || !window.EventSource) return;
  const state = document.querySelector("[data-live-state]");
  const tell = (text, isOn) => {
    if (!state || state.textContent === text) return;
    state.textContent = text;
    state.classList.toggle("on", isOn);
  };
  const drawn = new Map();
  const draw = (event) => {
    for (const [id, html] of Object.entries(JSON.parse(event.data))) {
      const part = document.getElementById(id);
      if (!part || drawn.get(id) === html || part.contains(document.activeElement)) continue;
      drawn.set(id, html);
      part.innerHTML = html;
      tellTimes(part);
    }
    tell("live", true);
  };
  let source = null;
  const follow = () => {
    if (document.hidden) {
      if (source) source.close();
      source = null;
      tell("paused while hidden", false);
    } else if (!source) {
      source = new EventSource(live.dataset.live);
      source.addEventListener("parts", draw);
      source.addEventListener("wrong", (event) => tell(JSON.parse(event.data), false));
      source.onerror = () => {
        const isOver = source && source.readyState === EventSource.CLOSED;
        tell(isOver ? "not live: reload the page" : "connecting again", false);
      };
    }
  };
  document.addEventListener("visibilitychange", follow);
  addEventListener("pagehide", () => source && source.close());
  requestAnimationFrame(() => setTimeout(follow));  // once the page as it came is painted
})();
