"use strict";
// Without this script the page is whole: it adds the choice of the theme, values under the pointer
// (or the arrow keys), and runs that can be hidden.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;

  const themes = ["auto", "light", "dark"];
  const theme = document.getElementById("theme");
  const keep = (name) => { try { localStorage.setItem("theme", name); } catch { /* no storage */ } };
  const kept = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
  const setTheme = (name) => {
    if (name === "auto") delete root.dataset.theme; else root.dataset.theme = name;
    theme.textContent = `Theme: ${name}`;
    theme.value = name;
  };
  setTheme(themes.includes(kept()) ? kept() : "auto");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const next = themes[(themes.indexOf(theme.value) + 1) % themes.length];
    setTheme(next);
    keep(next);
  });

  const shown = (value) => {
    if (value === null || value === undefined) return "none";
    if (value && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e7)) return value.toPrecision(3);
    return value.toLocaleString("en", { maximumSignificantDigits: 4 });
  };
  const nearest = (points, x) => points.reduce(
    (best, point) => Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best);

  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const chart = data[svg.dataset.chart];
    const figure = svg.closest("figure");
    const guide = svg.querySelector(".guide");
    const where = figure.querySelector(".where");
    const atRest = where.textContent;
    const values = new Map([...figure.querySelectorAll(".value")].map((v) => [+v.dataset.of, v]));
    const resting = new Map([...values].map(([run, value]) => [run, value.textContent]));
    const [low, high, left, right, width] = chart.x;
    let at = null;

    const tell = (x) => {
      at = Math.min(Math.max(x, low), high);
      const place = left + (at - low) / (high - low) * (right - left);
      guide.setAttribute("x1", place);
      guide.setAttribute("x2", place);
      guide.setAttribute("visibility", "visible");
      where.textContent = `at ${shown(chart.log ? 10 ** at : at)} ${chart.unit}`;
      for (const curve of chart.curves) {
        const [, y, least, most] = nearest(curve.points, at);
        const beyond = at > curve.points[curve.points.length - 1][0] + (high - low) / 100;
        const range = least === most || least === null ? "" : ` (${shown(least)} to ${shown(most)})`;
        values.get(curve.run).textContent = beyond ? "ended" : shown(y) + range;
      }
    };
    const rest = () => {
      at = null;
      guide.setAttribute("visibility", "hidden");
      where.textContent = atRest;
      for (const [run, value] of values) value.textContent = resting.get(run);
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const place = (event.clientX - box.left) / box.width * width;
      tell(low + (place - left) / (right - left) * (high - low));
    });
    svg.addEventListener("pointerleave", rest);
    svg.addEventListener("blur", rest);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") rest();
      if (!step) return;
      event.preventDefault();
      tell((at ?? high) + step * (high - low) / (event.shiftKey ? 10 : 100));
    });
  }

  for (const button of document.querySelectorAll(".legend button")) {
    button.disabled = false;
    button.addEventListener("click", () => {
      const hide = button.getAttribute("aria-pressed") === "true";
      for (const same of document.querySelectorAll(`.legend button[value="${button.value}"]`)) {
        same.setAttribute("aria-pressed", String(!hide));
      }
      for (const part of document.querySelectorAll(`svg [data-run="${button.value}"]`)) {
        part.classList.toggle("off", hide);
      }
    });
  }
})();
