/* A sidebar with the models that are loaded: how much of each is on the card, in RAM, on disk and passing through, what
   the last loop planned and moved, and a button that frees everything. Fed by events of the server; a page that opens
   later asks once for what was said last. */
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const EVENT = "diffsynth.memory";
const GIB = 1024 ** 3, MIB = 1024 ** 2;
const PLACES = {  // field → name, colour
  device_bytes: ["VRAM", "#4c9f70"], ring_bytes: ["staged", "#d9a441"], ram_bytes: ["RAM", "#4a7fb5"],
  disk_bytes: ["disk", "#7d7d85"] };
const PLANNED = {
  resident_bytes: ["stays", "#4c9f70"], ring_bytes: ["staged", "#d9a441"], activation_bytes: ["computation", "#a06cb5"] };
const SMALL = { fontSize: "11px", opacity: "0.8", margin: "2px 0", overflowWrap: "anywhere" };

export const words = (bytes) => bytes === 0 ? "0" : bytes >= GIB ? `${(bytes / GIB).toFixed(1)} GiB` : `${(bytes / MIB).toFixed(1)} MiB`;

/* An element with text or children. */
function make(tag, content, style = {}, className = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  Object.assign(element.style, style);
  if (typeof content === "string") element.textContent = content;
  else element.append(...content);
  return element;
}

/* A bar of parts, each [bytes, name, colour], as wide as `whole` bytes. */
function makeBar(parts, whole) {
  const pieces = parts.filter(([bytes]) => bytes > 0).map(([bytes, name, colour]) => {
    const piece = make("div", "", { width: `${100 * bytes / Math.max(whole, 1)}%`, background: colour });
    piece.title = `${name} ${words(bytes)}`;
    return piece;
  });
  return make("div", pieces, { display: "flex", height: "10px", borderRadius: "3px", overflow: "hidden",
    background: "var(--comfy-input-bg, #222)" }, "diffsynth-bar");
}

const partsOf = (figures, kinds) => Object.entries(kinds).map(([field, [name, colour]]) =>
  [figures[field], name, colour]);
const sumOf = (parts) => parts.reduce((sum, [bytes]) => sum + bytes, 0);
const listed = (parts) => parts.filter(([bytes]) => bytes > 0).map(([bytes, name]) => `${name} ${words(bytes)}`)
  .join(" · ");

function makeModel(model, largest) {
  const parts = partsOf(model, PLACES);
  const adapters = model.adapter_bytes ? ` (LoRAs ${words(model.adapter_bytes)})` : "";
  return make("div", [make("div", `${model.name} · ${model.kind}`), makeBar(parts, largest),
    make("div", listed(parts) + adapters, SMALL)], { margin: "6px 0" }, "diffsynth-model");
}

function makePlan({ plan, limit_bytes: limit, counted_bytes: counted }, device) {
  const parts = partsOf(plan, PLANNED);
  const room = limit || device || sumOf(parts);  // a limit of 0 is no room: nothing stays, and the rest has to be
  const of = limit ? ` of the limit, ${words(limit)}` : device ? ` of ${words(device)}` : "";
  const read = plan.read_bytes_per_step;
  const fromDisk = !read ? "" : read < plan.bytes_per_step ? `, ${words(read)} of that from disk` : " from disk";
  return make("div", [make("div", "Plan of the last loop"), makeBar(parts, room),
    make("div", `${listed(parts)}${of} · ${words(counted)} in use now`, SMALL),
    make("div", `${words(plan.bytes_per_step)} cross per step${fromDisk}, about ${plan.step_seconds.toFixed(2)} s`,
      SMALL)], { margin: "6px 0" }, "diffsynth-plan");
}

const trafficWords = (traffic) => `Moved ${words(traffic.moved_bytes)} in ${traffic.passes} passes at `
  + `${words(traffic.bandwidth)}/s, waited ${traffic.stall_seconds.toFixed(1)} s; at most `
  + `${words(traffic.peak_device_bytes)} of weights on the device`;

function makePipeline(pipeline, device) {
  const largest = Math.max(...pipeline.models.map((model) => sumOf(partsOf(model, PLACES))), 1);
  const limit = pipeline.limit_bytes === null ? "no limit"
    : pipeline.limit_bytes === 0 ? "limit 0: nothing stays" : `limit ${words(pipeline.limit_bytes)}`;
  return make("section", [make("div", pipeline.title, { fontWeight: "bold", overflowWrap: "anywhere" }),
    make("div", `${pipeline.family} · ${pipeline.dtype} on ${pipeline.device} · ${limit}`, SMALL),
    ...pipeline.models.map((model) => makeModel(model, largest)),
    ...(pipeline.plan ? [makePlan(pipeline, device)] : []),
    ...(pipeline.traffic ? [make("div", trafficWords(pipeline.traffic), SMALL, "diffsynth-traffic")] : [])],
  { borderTop: "1px solid var(--border-color, #444)", padding: "8px 0" }, "diffsynth-pipeline");
}

function makeLegend() {
  const names = Object.values({ ...PLACES, activation_bytes: PLANNED.activation_bytes });
  return make("div", names.map(([name, colour]) => make("span", [
    make("span", "", { display: "inline-block", width: "9px", height: "9px", marginRight: "4px", background: colour }),
    document.createTextNode(name)], { display: "inline-block", marginRight: "10px" })), { ...SMALL, margin: "6px 0" });
}

/* Have ComfyUI free all models, ours and its own, and what it keeps of earlier runs. What runs is not disturbed. */
export async function freeEverything() {
  await api.fetchApi("/free", { method: "POST", headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ unload_models: true, free_memory: true }) });
}

function makeButton() {
  const button = make("button", "Free everything", { padding: "5px 10px", cursor: "pointer" }, "diffsynth-free");
  button.title = "Unload all models and forget earlier results, at the next moment when nothing runs";
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      await freeEverything();
    } finally {
      button.disabled = false;
    }
  });
  return button;
}

let state = { device: null, device_bytes: null, pipelines: [] };
let list = null;  // where the open sidebar shows the pipelines

export function update(news) {
  state = news;
  if (!list) return;
  const pipelines = state.pipelines.map((pipeline) => makePipeline(pipeline, state.device_bytes));
  list.replaceChildren(...(pipelines.length ? pipelines : [make("p", "No model is loaded.")]));
}

async function fetchState() {
  const reply = await api.fetchApi("/diffsynth_backend/memory");
  if (reply.ok) update(await reply.json());
}

export function render(container) {
  list = make("div", []);
  container.replaceChildren(make("div", [make("h3", "DiffSynth memory", { margin: "0 0 8px" }), makeButton(),
    makeLegend(), list], { padding: "12px", overflow: "auto", height: "100%", boxSizing: "border-box",
    fontSize: "13px" }, "diffsynth-memory"));
  update(state);
}

app.registerExtension({
  name: "DiffSynthBackend.MemoryMap",
  setup() {
    api.addEventListener(EVENT, ({ detail }) => update(detail));
    fetchState().catch(() => {});  // without a server the page has other things to say
    app.extensionManager.registerSidebarTab({ id: "diffsynth-memory", icon: "pi pi-chart-bar", title: "Memory",
      tooltip: "Memory map (DiffSynth)", type: "custom", render, destroy: () => { list = null; } });
  },
});
