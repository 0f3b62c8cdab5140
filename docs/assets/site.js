// What scrolls is reached by keys, and what opens has a name.
function reachable() {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap, pre > code, .highlight-ipynb")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
  document.querySelectorAll(".md-code__nav").forEach((nav, number) => nav.setAttribute("aria-label", `Code ${number + 1}`));
}
// The comment at the head of a cell says what is seen on its picture.
for (const image of document.querySelectorAll(".jp-RenderedImage img")) {
  const comment = image.closest(".jp-Cell").querySelector(".c1");
  if (comment) image.alt = comment.textContent.replace("# ", "");
}
document.querySelectorAll("th:empty").forEach((cell) => cell.replaceWith(document.createElement("td")));
document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
window.addEventListener("resize", reachable);
new MutationObserver(reachable).observe(document.querySelector(".md-content"), { childList: true, subtree: true });
window.addEventListener("load", reachable);
