"use strict";
// A click on a column's head sorts the rows by it, upwards first, then downwards; what has no value stays last.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[head.cellIndex].dataset.order ?? "";
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const difference = Number.isNaN(x - y) ? x.localeCompare(y) : x - y;
      return down ? -difference : difference;
    };
    body.append(...[...body.rows].sort(compare));
  });
}
// A line of a chart is one stop of the Tab key; the arrow keys go along its points. What a point says stands below it.
for (const figure of document.querySelectorAll("figure")) {
  const reading = figure.querySelector(".reading");
  for (const line of figure.querySelectorAll("g")) {
    const marks = [...line.querySelectorAll(".mark")];
    marks.forEach((mark, place) => {
      mark.setAttribute("tabindex", place === 0 ? "0" : "-1");
      const say = () => { reading.textContent = mark.getAttribute("aria-label"); };
      mark.addEventListener("focus", say);
      mark.addEventListener("mouseenter", say);
      mark.addEventListener("keydown", (event) => {
        const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: marks.length - 1 }[event.key];
        if (marks[next] === undefined) return;
        event.preventDefault();
        mark.setAttribute("tabindex", "-1");
        marks[next].setAttribute("tabindex", "0");
        marks[next].focus();
      });
    });
  }
}
// On paper the numbers behind the charts are shown.
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
