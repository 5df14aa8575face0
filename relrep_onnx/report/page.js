// Sorting, lines that answer to their rows, and details that open for the printer.  The page is whole without it.

const valueOf = (row, column) => {
  const cell = row.cells[column];
  const value = cell.dataset.value;
  return value === undefined ? (cell.textContent.trim() === "-" ? null : cell.textContent) : Number(value);
};

const compare = (a, b) => {
  if (a === null || b === null) return (a === null) - (b === null); // nothing comes last, either way
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
};

function makeSortable(table) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const original = [...body.rows];
  if (original.length < 2) return;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")];
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", next);
      const sign = next === "descending" ? -1 : 1;
      const rows = next === "none" ? original : [...original].sort((one, other) => {
        const [a, b] = [valueOf(one, column), valueOf(other, column)];
        return a === null || b === null ? compare(a, b) : sign * compare(a, b);
      });
      body.append(...rows);
    });
  });
}

document.querySelectorAll("main table").forEach(makeSortable);

const lines = [...document.querySelectorAll(".series")];
const rows = [...document.querySelectorAll("tbody tr")];

function point(name) {
  lines.forEach((line) => {
    const same = line.dataset.name === name;
    line.classList.toggle("pointed", same);
    if (same) line.parentNode.append(line); // above the others
  });
  rows.forEach((row) => row.classList.toggle("pointed", row.cells[0].textContent === name));
  document.querySelectorAll("figure output").forEach((output) => {
    const drawn = lines.some((line) => line.dataset.name === name && output.parentNode.contains(line));
    output.textContent = drawn ? name : "";
  });
}

const several = document.querySelectorAll(".chart").length > 0 && lines.length > 1;
if (several) {
  lines.forEach((line) => line.addEventListener("pointerenter", () => point(line.dataset.name)));
  rows.forEach((row) => row.addEventListener("pointerenter", () => point(row.cells[0].textContent)));
  document.querySelectorAll(".chart, table").forEach((part) => part.addEventListener("pointerleave", () => point(null)));
}

const closed = () => [...document.querySelectorAll("details:not([open])")];
let opened = [];
addEventListener("beforeprint", () => { opened = closed(); opened.forEach((part) => { part.open = true; }); });
addEventListener("afterprint", () => opened.forEach((part) => { part.open = false; }));
