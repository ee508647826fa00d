/* A sidebar with the models that are loaded: how much of each is on the card, in RAM, on disk and passing through, what
   the last loop planned and moved, and a button that frees everything. Fed by events of the server; a page that opens
   later asks once for what was said last. */
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { memorySize } from "./lines.js";
import { say, whenLanguageChanges } from "./words.js";

const EVENT = "diffsynth.memory";
const PLACES = {  // field → its word, colour
  device_bytes: ["vram", "#4c9f70"], ring_bytes: ["staged", "#d9a441"], ram_bytes: ["ram", "#4a7fb5"],
  disk_bytes: ["disk", "#7d7d85"] };
const PLANNED = {
  resident_bytes: ["stays", "#4c9f70"], ring_bytes: ["staged", "#d9a441"], activation_bytes: ["computation", "#a06cb5"] };
const SMALL = { fontSize: "11px", opacity: "0.8", margin: "2px 0", overflowWrap: "anywhere" };

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
    piece.title = `${name} ${memorySize(bytes)}`;
    return piece;
  });
  return make("div", pieces, { display: "flex", height: "10px", borderRadius: "3px", overflow: "hidden",
    background: "var(--comfy-input-bg, #222)" }, "diffsynth-bar");
}

const partsOf = (figures, kinds) => Object.entries(kinds).map(([field, [word, colour]]) =>
  [figures[field], say()[word], colour]);
const sumOf = (parts) => parts.reduce((sum, [bytes]) => sum + bytes, 0);
const listed = (parts) => parts.filter(([bytes]) => bytes > 0).map(([bytes, name]) => `${name} ${memorySize(bytes)}`)
  .join(" · ");

function makeModel(model, largest) {
  const parts = partsOf(model, PLACES), line = listed(parts);
  const adapters = model.adapter_bytes;
  return make("div", [make("div", `${model.name} · ${model.kind}`), makeBar(parts, largest),
    make("div", adapters ? say().withLoras(line, memorySize(adapters)) : line, SMALL)], { margin: "6px 0" },
  "diffsynth-model");
}

function stepWords({ bytes_per_step: moved, read_bytes_per_step: read, step_seconds: seconds }) {
  const all = memorySize(moved);
  const what = !read ? say().perStep(all) : read < moved ? say().partFromDisk(all, memorySize(read))
    : say().fromDisk(all);
  return say().aboutSeconds(what, seconds.toFixed(2));
}

function makePlan({ plan, limit_bytes: limit, counted_bytes: counted }, device) {
  const parts = partsOf(plan, PLANNED), line = listed(parts);
  const room = limit || device || sumOf(parts);  // a limit of 0 is no room: nothing stays, and the rest has to be
  const planned = limit ? say().ofLimit(line, memorySize(limit)) : device ? say().ofDevice(line, memorySize(device))
    : line;
  return make("div", [make("div", say().lastPlan), makeBar(parts, room),
    make("div", `${planned} · ${say().inUse(memorySize(counted))}`, SMALL), make("div", stepWords(plan), SMALL)],
  { margin: "6px 0" }, "diffsynth-plan");
}

const trafficWords = (traffic) => `${say().traffic(memorySize(traffic.moved_bytes), traffic.passes,
  memorySize(traffic.bandwidth), traffic.stall_seconds.toFixed(1))} · ${say().peak(memorySize(traffic.peak_device_bytes))}`;

function limitWords(limit) {
  return limit === null ? say().noLimit : limit === 0 ? say().limitZero : say().limit(memorySize(limit));
}

function makePipeline(pipeline, device) {
  const largest = Math.max(...pipeline.models.map((model) => sumOf(partsOf(model, PLACES))), 1);
  const about = say().pipeline(pipeline.family, pipeline.dtype, pipeline.device, limitWords(pipeline.limit_bytes));
  return make("section", [make("div", pipeline.title, { fontWeight: "bold", overflowWrap: "anywhere" }),
    make("div", about, SMALL),
    ...pipeline.models.map((model) => makeModel(model, largest)),
    ...(pipeline.plan ? [makePlan(pipeline, device)] : []),
    ...(pipeline.traffic ? [make("div", trafficWords(pipeline.traffic), SMALL, "diffsynth-traffic")] : [])],
  { borderTop: "1px solid var(--border-color, #444)", padding: "8px 0" }, "diffsynth-pipeline");
}

function makeLegend() {
  const names = Object.values({ ...PLACES, activation_bytes: PLANNED.activation_bytes });
  return make("div", names.map(([word, colour]) => make("span", [
    make("span", "", { display: "inline-block", width: "9px", height: "9px", marginRight: "4px", background: colour }),
    document.createTextNode(say()[word])], { display: "inline-block", marginRight: "10px" })), { ...SMALL, margin: "6px 0" });
}

/* Have ComfyUI free all models, ours and its own, and what it keeps of earlier runs. What runs is not disturbed. */
export async function freeEverything() {
  await api.fetchApi("/free", { method: "POST", headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ unload_models: true, free_memory: true }) });
}

function makeButton() {
  const button = make("button", say().free, { padding: "5px 10px", cursor: "pointer" }, "diffsynth-free");
  button.title = say().freeTooltip;
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
let sidebar = null;  // the open one, its list of pipelines, and the words that it is in

export function update(news) {
  state = news;
  if (!sidebar) return;
  if (sidebar.words !== say()) return render(sidebar.container);  // in another language since
  const pipelines = state.pipelines.map((pipeline) => makePipeline(pipeline, state.device_bytes));
  sidebar.list.replaceChildren(...(pipelines.length ? pipelines : [make("p", say().nothingLoaded)]));
}

async function fetchState() {
  const reply = await api.fetchApi("/diffsynth_backend/memory");
  if (reply.ok) update(await reply.json());
}

export function render(container) {
  sidebar = { container, list: make("div", []), words: say() };
  container.replaceChildren(make("div", [make("h3", say().memoryTitle, { margin: "0 0 8px" }), makeButton(),
    makeLegend(), sidebar.list], { padding: "12px", overflow: "auto", height: "100%", boxSizing: "border-box",
    fontSize: "13px" }, "diffsynth-memory"));
  update(state);
}

app.registerExtension({
  name: "DiffSynthBackend.MemoryMap",
  setup() {
    api.addEventListener(EVENT, ({ detail }) => update(detail));
    whenLanguageChanges(() => update(state));
    fetchState().catch(() => {});  // without a server the page has other things to say
    app.extensionManager.registerSidebarTab({ id: "diffsynth-memory", icon: "pi pi-chart-bar", title: say().memory,
      tooltip: say().memoryTooltip, type: "custom", render, destroy: () => { sidebar = null; } });
  },
});
