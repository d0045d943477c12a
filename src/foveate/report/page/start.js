// ---------------------------------------------------------------- start

/** Links of the sentences lead to their evidence: a metric in the grid, or a head. */
function startLinks() {
  document.querySelector(".findings")?.closest("section").addEventListener("click", event => {
    const link = event.target.closest("a[data-metric], a[data-head]");
    if (!link) return;
    if (link.dataset.head) openHead(link.dataset.head, false);
    else if ([...byId("metric").options].some(o => o.value === link.dataset.metric)) change({ metric: link.dataset.metric });
  });
}

async function start() {
  if (!("DecompressionStream" in globalThis)) throw new Error("this browser is older than 2023 and cannot unpack the figures; open the file in a newer one");
  buffer = await unpack("arrays");
  texts = JSON.parse(new TextDecoder().decode(await unpack("texts")));
  await drawFigures();
  startTheme();
  startGrids();
  startTable();
  const first = startMetricControls();
  const metric = startDifferences() ?? first;
  const open = startHead();
  startLayers();
  startLinks();
  state.cursor = open;
  change({ metric });
  drawMarks();
  change({ open });
  document.documentElement.dataset.ready = "yes";
}

start().catch(error => {
  const node = byId("trouble");
  node.hidden = false;
  node.textContent = `The figures could not be drawn: ${error.message}. The findings below stand without them.`;
  console.error(error);
});
