"use strict";
/* The page works without this. It filters the list, shows one trajectory at a time and reads values off curves.
   Text only ever goes into textContent. */
(() => {
  document.documentElement.classList.add("js");

  const svg = (chart) => {
    const points = JSON.parse(chart.dataset.points);
    const cursor = chart.querySelector(".cursor");
    const value = chart.closest("figure").querySelector(".plot-value");
    let at = points.length - 1;
    const show = (index) => {
      at = Math.max(0, Math.min(points.length - 1, index));
      const [x, y, step, text] = points[at];
      cursor.setAttribute("cx", x);
      cursor.setAttribute("cy", y);
      chart.classList.add("active");
      value.textContent = `step ${step}: ${text}`;
    };
    const rest = () => {
      chart.classList.remove("active");
      value.textContent = value.dataset.rest;
    };
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
      let nearest = 0;
      points.forEach((point, index) => {
        if (Math.abs(point[0] - x) < Math.abs(points[nearest][0] - x)) nearest = index;
      });
      show(nearest);
    });
    chart.addEventListener("pointerleave", rest);
    chart.addEventListener("blur", rest);
    chart.addEventListener("keydown", (event) => {
      const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: points.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      show(to);
    });
  };
  document.querySelectorAll("svg.line").forEach(svg);

  const list = document.getElementById("list");
  if (!list) return;
  const entries = [...list.querySelectorAll("li")].map((row) => {
    const link = row.querySelector("a");
    const article = document.getElementById(link.hash.slice(1));
    return { row, link, article, text: article.textContent.toLowerCase() };
  });
  const stage = document.getElementById("by-stage");
  const outcome = document.getElementById("by-outcome");
  const text = document.getElementById("by-text");
  let open = null;

  const select = (entry, { reveal = false } = {}) => {
    if (open) {
      open.article.classList.remove("open");
      open.link.removeAttribute("aria-current");
    }
    open = entry;
    if (!entry) return;
    entry.article.classList.add("open");
    entry.link.setAttribute("aria-current", "true");
    if (reveal) {
      history.replaceState(null, "", entry.link.hash);
      const beside = list.getBoundingClientRect().right <= entry.article.getBoundingClientRect().left;
      if (!beside) entry.article.scrollIntoView({ block: "start" });
      entry.article.focus({ preventScroll: true });
    }
  };

  const visible = () => entries.filter((entry) => !entry.row.hidden);

  const filter = () => {
    const wanted = text.value.trim().toLowerCase();
    entries.forEach((entry) => {
      const { row } = entry;
      row.hidden = !(
        (!stage.value || row.dataset.stage === stage.value) &&
        (!outcome.value || row.dataset.outcome === outcome.value) &&
        (!wanted || entry.text.includes(wanted))
      );
    });
    const left = visible();
    document.getElementById("num-shown").textContent = `${left.length} of ${entries.length} shown`;
    document.getElementById("none-shown").hidden = left.length > 0;
    if (!open || open.row.hidden) select(left[0] || null);
  };

  entries.forEach((entry) =>
    entry.link.addEventListener("click", (event) => {
      event.preventDefault();
      select(entry, { reveal: true });
    }),
  );
  list.addEventListener("keydown", (event) => {
    const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!move) return;
    const shown = visible();
    const next = shown[shown.findIndex((entry) => entry.link === document.activeElement) + move];
    if (!next) return;
    event.preventDefault();
    select(next);
    next.link.focus();
  });
  document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
  [stage, outcome].forEach((field) => field.addEventListener("change", filter));
  text.addEventListener("input", filter);
  const follow = () => {
    const entry = entries.find(({ link }) => link.hash === location.hash);
    if (!entry) return;
    list.scrollTop += entry.row.getBoundingClientRect().top - list.getBoundingClientRect().top - 60;
    select(entry, { reveal: true });
  };
  addEventListener("hashchange", follow);
  filter();
  follow();
})();
