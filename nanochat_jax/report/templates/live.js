// Fetches the page again every few seconds and changes what differs, nothing else: where one has
// scrolled to, what is unfolded or chosen and what has the focus stay as they are.
"use strict";
const main = document.querySelector("main");
const gone = document.querySelector("#gone");

function change(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (old.nodeName !== fresh.nodeName || old.nodeName === "svg") return old.replaceWith(fresh);
  if (old.nodeType === Node.TEXT_NODE) old.data = fresh.data;
  for (const { name, value } of fresh.attributes ?? []) old.setAttribute(name, value);
  const [before, after] = [[...old.childNodes], [...fresh.childNodes]];
  after.forEach((node, i) => (i < before.length ? change(before[i], node) : old.append(node)));
  before.slice(after.length).forEach((node) => node.remove());
}

async function refresh() {
  const folds = () => [...main.querySelectorAll("details")];
  const name = (fold) => fold.firstElementChild.textContent;
  if (!document.hidden) {
    try {
      const answer = await fetch(location.href);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const open = new Set(folds().filter((fold) => fold.open).map(name));
      change(main, page.querySelector("main"));
      folds().forEach((fold) => (fold.open = open.has(name(fold))));
      document.title = page.title;
      gone.hidden = true;
    } catch {
      gone.hidden = false;
    }
  }
  setTimeout(refresh, 1000 * main.dataset.refreshSecs);
}
setTimeout(refresh, 1000 * main.dataset.refreshSecs);
