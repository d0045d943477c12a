"use strict";
// Runs before the first paint: the page follows the system until somebody chooses.
const THEMES = ["auto", "light", "dark"];
const dark = matchMedia("(prefers-color-scheme: dark)");
let chosenTheme = "auto";
function applyTheme(name = chosenTheme) {
  const now = name === "auto" ? (dark.matches ? "dark" : "light") : name;
  document.documentElement.dataset.theme = now;
  return now;
}
applyTheme();
