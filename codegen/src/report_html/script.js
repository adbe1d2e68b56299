"use strict";
// Everything can be read without this: it only sorts tables and opens all steps at once.
for (const table of document.querySelectorAll("table")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(table, head, column));
  });
}
function sort(table, head, column) {
  const body = table.tBodies[0];
  const first = head.classList.contains("n") ? "descending" : "ascending";
  const other = first === "ascending" ? "descending" : "ascending";
  const order = head.getAttribute("aria-sort") === first ? other : first;
  for (const each of head.parentNode.children) each.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const value = (row) => row.children[column].dataset.key ?? row.children[column].textContent;
  const compare = head.classList.contains("n")
    ? (a, b) => value(a) - value(b)
    : (a, b) => value(a).localeCompare(value(b), "en", { numeric: true });
  body.append(...[...body.rows].sort((a, b) => sign * compare(a, b)));
}
const chips = document.querySelectorAll("#graph details");
if (chips.length > 0) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "all";
  let open = false;
  const label = () => { button.textContent = open ? "Close all steps" : "Open all steps"; };
  button.addEventListener("click", () => {
    open = !open;
    for (const chip of chips) chip.open = open;
    label();
  });
  label();
  document.querySelector("#graph h2").after(button);
}
