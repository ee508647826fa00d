/* Shows below VRAM Config, while one edits, what its settings come to for the models of the Model Loader that it is
   connected to. The server reads headers for that and loads nothing.
   What is edited may be another node, or a size, or a link: so the graph is looked at a few times a second, and the
   server is asked when nothing has changed between two looks. */
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { estimateLines, problemLine } from "./lines.js";
import { clearText, showText } from "./node_text.js";
import { say } from "./words.js";

const LOOK_EVERY = 400;  // milliseconds
const PREFIX = "DiffSynthBackend_";
const OWN_FILES = "model configs";
const STATES = ["offload", "onload", "preparing", "computation"];
const FIELDS = STATES.flatMap((state) => [`${state}_dtype`, `${state}_device`]);
const LIMITS = { automatic: "automatic", none: "none" };

const valueOf = (node, name) => node?.widgets?.find((widget) => widget.name === name)?.value;
const isOurs = (node, kind) => node?.type === PREFIX + kind;

/* What stands in the Model Configs that are connected to a loader; null if something else is. */
function filesOf(loader, withConfigs) {
  const files = [];
  for (const [slot, input] of loader.inputs.entries()) {
    const isConfig = input.name.startsWith("model.configs.");
    if (input.link == null || !(input.name.startsWith("extras.") || (withConfigs && isConfig))) continue;
    const source = loader.getInputNode(slot);
    if (!isOurs(source, "ModelConfig")) return null;
    files.push(valueOf(source, "model"));
  }
  return files;
}

/* The size that the graph draws, if it says one. */
function sizeOf(graph) {
  const latents = graph._nodes.filter((node) => isOurs(node, "EmptyLatent"));
  if (latents.length !== 1) return {};
  const [width, height] = ["width", "height"].map((name) => valueOf(latents[0], name));
  return Number.isInteger(width) && Number.isInteger(height) ? { width, height } : {};
}

/* What to ask the server about a VRAM Config; null where nothing can be said. */
export function queryOf(node, graph) {
  const loader = node.getOutputNodes(0)?.find((target) => isOurs(target, "ModelLoader"));
  if (!loader) return null;
  const model = valueOf(loader, "model");
  const files = filesOf(loader, model === OWN_FILES);
  if (!model || !files) return null;
  const limit = valueOf(node, "vram_limit");
  const entries = { ...(model === OWN_FILES ? { family: valueOf(loader, "model.family") } : { model }),
    dtype: valueOf(loader, "dtype"), preset: valueOf(node, "preset"),
    limit: LIMITS[limit] ?? valueOf(node, "vram_limit.gib"),
    ram: valueOf(node, "ram_limit") === "GiB" ? valueOf(node, "ram_limit.gib") : "none", ...sizeOf(graph) };
  for (const name of FIELDS) entries[name] = valueOf(node, name);
  files.forEach((file, index) => { entries[`file${index}`] = file; });
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(entries)) if (value !== undefined) query.set(name, value);
  return query.toString();
}

/* Of each node: what was seen at the last look, what its text is about, and the words that it is in. */
const seen = new WeakMap();

async function ask(node, query) {
  const reply = await api.fetchApi(`/diffsynth_backend/estimate?${query}`);
  const answer = reply.ok ? await reply.json() : null;
  if (seen.get(node)?.asked !== query) return;  // edited meanwhile
  if (answer) showText(node, answer.estimate ? estimateLines(answer.estimate, say()) : problemLine(answer, say()));
  else clearText(node);
}

function lookAt(node, graph) {
  const query = queryOf(node, graph);
  const before = seen.get(node) ?? {};
  const settled = before.query === query;
  const asked = settled ? query : before.asked;
  seen.set(node, { query, asked, words: say() });
  if (!settled || (before.asked === query && before.words === say())) return;
  if (query === null) clearText(node);
  else ask(node, query).catch(() => clearText(node));  // the server is gone: the page says so itself
}

/* One look at the graph that is shown. */
export function look() {
  const graph = app.canvas?.graph ?? app.graph;
  if (document.hidden || !graph) return;
  for (const node of graph._nodes) if (isOurs(node, "VramConfig")) lookAt(node, graph);
}

app.registerExtension({ name: "DiffSynthBackend.VramPlan", setup: () => { setInterval(look, LOOK_EVERY); } });
