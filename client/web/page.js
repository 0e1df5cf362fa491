// Looks every few seconds whether a page has changed, and puts the newly rendered <main> in place of the old one.
// A page with the reader's focus in it stays as it is; one without data-live does so always.
"use strict";

const EVERY_MS = 5000;
const live = document.getElementById("live");

async function look(main) {
  const answer = await fetch(location.pathname, { headers: { "x-konsil-live": "1" }, cache: "no-store" });
  if (answer.redirected) {
    location.assign("/login");
    return;
  }
  if (!answer.ok) {
    throw new Error(answer.statusText);
  }
  // A parsed document runs nothing.
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main");
  if (fresh.innerHTML !== main.innerHTML && !main.contains(document.activeElement)) {
    main.replaceWith(document.adoptNode(fresh));
  }
}

async function follow() {
  const main = document.querySelector("main[data-live]");
  if (!main) {
    live.textContent = "";
    return;
  }
  let said = live.dataset.on;
  try {
    if (!document.hidden) {
      await look(main);
    }
  } catch {
    said = live.dataset.off;
  }
  if (live.textContent !== said) {
    live.textContent = said;
  }
  setTimeout(follow, EVERY_MS);
}

follow();
