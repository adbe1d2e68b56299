"use strict";
// Put at the end of a report by the chromium oracle, which says what to expect; tells the page around
// it what is wrong.
(() => {
  const wrong = [];
  const expect = (holds, what) => { if (!holds && wrong.length < 20) wrong.push(what); };
  const name = (element) => `${element.tagName.toLowerCase()}.${element.className} "${element.textContent.trim().slice(0, 40)}"`;

  expect(innerWidth === EXPECTED.width, `the frame is ${innerWidth} wide, not ${EXPECTED.width}`);
  expect(matchMedia("(prefers-color-scheme: dark)").matches === EXPECTED.dark, "the colour scheme is not the wanted one");
  for (const id of ["time", "memory", "graph", "collectives", "stored", "outputs"]) {
    const section = document.getElementById(id);
    expect(section && section.getBoundingClientRect().height > 40, `section ${id} is missing or empty`);
  }
  const loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
  expect(loaded.length === 0, `loaded ${loaded.join(", ")}`);

  const luminance = ([r, g, b]) => {
    const linear = [r, g, b].map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const channels = (colour) => colour.match(/[\d.]+/g).map(Number);
  const opaque = (colour) => channels(colour).length === 3 || channels(colour)[3] === 1;
  const background = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (opaque(colour)) return channels(colour);
    }
    return [255, 255, 255];
  };
  const check = (when) => {
    expect(document.documentElement.scrollWidth <= innerWidth, `${when}: the page is ${document.documentElement.scrollWidth} wide`);
    for (const element of document.body.querySelectorAll("*")) {
      if (element.closest(".scroll") && !element.classList.contains("scroll")) continue;
      const box = element.getBoundingClientRect();
      expect(box.right <= innerWidth + 0.5, `${when}: ${name(element)} reaches to ${box.right}`);
    }
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    let texts = 0;
    while (walker.nextNode()) {
      const element = walker.currentNode.parentElement;
      if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest("script")) continue;
      if (element.getClientRects().length === 0) continue;
      const style = getComputedStyle(element);
      const [light, dark] = [luminance(channels(style.color)), luminance(background(element))].sort((a, b) => b - a);
      const contrast = (light + 0.05) / (dark + 0.05);
      expect(contrast >= 4.5, `${when}: contrast ${contrast.toFixed(2)} of ${name(element)}`);
      expect(parseFloat(style.fontSize) >= 11, `${when}: ${style.fontSize} text of ${name(element)}`);
      texts += 1;
    }
    expect(texts > 100, `${when}: only ${texts} texts`);
  };
  check("closed");
  const all = document.querySelector("button.all");
  expect(all, "no button opens all steps");
  all?.click();
  const chips = [...document.querySelectorAll("#graph details")];
  expect(chips.length > 20 && chips.every((chip) => chip.open), `not all of ${chips.length} steps open`);
  check("open");

  const head = document.querySelector("#stored thead th.n button");
  const column = head ? [...head.closest("tr").children].indexOf(head.closest("th")) : 0;
  const values = () => [...document.querySelector("#stored tbody").rows].map((row) => Number(row.children[column].dataset.key));
  for (const [order, sign] of [["descending", -1], ["ascending", 1]]) {
    head?.click();
    const found = values();
    expect(head?.closest("th").getAttribute("aria-sort") === order, `the weights do not say they are ${order}`);
    expect(found.length > 0 && found.every((v, i) => i === 0 || sign * (v - found[i - 1]) >= 0), `${found} is not ${order}`);
  }

  // The page is in a frame, because windows cannot be as narrow as phones.
  parent.postMessage(wrong.length === 0 ? "all well" : wrong.join("\n"), "*");
})();
