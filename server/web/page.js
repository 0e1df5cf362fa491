// Asks every few seconds whether anything has changed, and if so puts the newly rendered <main> in place of the old one.
"use strict";

const EVERY_MS = 2000;
const LONGEST_MS = 30000;
const live = document.getElementById("live");
let wait = EVERY_MS;

async function get(address, accept) {
  const answer = await fetch(address, { headers: { accept }, cache: "no-store" });
  if (answer.status === 401 || answer.redirected) {
    location.assign("/login");
  }
  if (!answer.ok) {
    throw new Error(answer.statusText);
  }
  return answer;
}

async function look() {
  const main = document.querySelector("main");
  const { version } = await (await get(main.dataset.api, "application/json")).json();
  if (version === main.dataset.version) {
    return;
  }
  const text = await (await get(location.pathname, "text/html")).text();
  // A parsed document runs nothing.
  main.replaceWith(document.adoptNode(new DOMParser().parseFromString(text, "text/html").querySelector("main")));
}

async function follow() {
  try {
    if (!document.hidden) {
      await look();
    }
    live.textContent = "live";
    live.className = "on";
    wait = EVERY_MS;
  } catch {
    live.textContent = "the coordinator does not answer";
    live.className = "off";
    wait = Math.min(2 * wait, LONGEST_MS);
  }
  setTimeout(follow, wait);
}

follow();
