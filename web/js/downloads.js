/* Below the nodes that choose a known model: its size and licence, which of its files are here, and a button that
   downloads the others as the setting DiffSynth.Downloads allows. The server reads that setting for itself; here it only
   decides whether to ask first. A workflow that is opened without its models says so once.
   ComfyUI's own dialog for missing models knows choices that are names of files; these are names of models, each of
   several files in folders. */
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { downloadLine, fileLines, fileSize, missingParts, offLines, question } from "./lines.js";
import { follow, nodeOf } from "./node_text.js";
import { say, whenLanguageChanges } from "./words.js";

/* The nodes, each with the widget that names a model. */
const NODES = { DiffSynthBackend_ModelLoader: "model", DiffSynthBackend_ModelConfig: "model",
  DiffSynthBackend_LoraLoader: "lora", DiffSynthBackend_DownloadModels: "model" };
const WIDGET = "files";
const HEIGHT = 112;
const NEVER = 2, BYPASS = 4;  // modes of nodes that do not run
const TOAST_LIFE = 20_000;  // milliseconds
const TEXT_STYLE = { margin: "0", font: "11px/15px sans-serif", whiteSpace: "pre-wrap", overflowWrap: "anywhere",
  color: "var(--input-text)", userSelect: "text" };
const BOX_STYLE = { padding: "4px 6px", overflow: "auto", boxSizing: "border-box", borderRadius: "4px",
  background: "var(--comfy-input-bg)" };
const BUTTON_STYLE = { margin: "4px 0 0", padding: "2px 10px", font: "11px sans-serif", cursor: "pointer",
  color: "var(--input-text)", background: "var(--comfy-menu-bg)", border: "1px solid var(--border-color)",
  borderRadius: "4px" };

const running = new Map();  // prompt id → the node below which a download was started
const told = new Set();  // what opened workflows were said to lack
let notice = null;  // the last that said so

async function stateOf(name) {
  const reply = await api.fetchApi(`/diffsynth_backend/models?name=${encodeURIComponent(name)}`);
  return reply.ok ? reply.json() : null;
}

function element(tag, style, className) {
  const made = Object.assign(document.createElement(tag), { className });
  Object.assign(made.style, style);
  return made;
}

function makeWidget(node) {
  const box = element("div", BOX_STYLE, "diffsynth-files");
  const parts = { text: element("pre", TEXT_STYLE, ""), button: element("button", BUTTON_STYLE, ""),
    line: element("pre", TEXT_STYLE, "diffsynth-download") };
  parts.button.addEventListener("click", () => download(node));
  box.append(parts.text, parts.button, parts.line);
  const widget = node.addDOMWidget(WIDGET, "diffsynth_files", box,
    { serialize: false, getMinHeight: () => (box.hidden ? 0 : HEIGHT) });
  widget.serialize = false;
  widget.parts = parts;
  return widget;
}

const widgetOf = (node) => node.widgets?.find((candidate) => candidate.name === WIDGET);
const choiceOf = (node) => node.widgets?.find((candidate) => candidate.name === NODES[node.comfyClass ?? node.type])?.value;

function show(node, state) {
  if (!state && !widgetOf(node)) return;
  const widget = widgetOf(node) ?? makeWidget(node);
  widget.element.hidden = !state;
  widget.element.style.display = state ? "" : "none";
  if (state) {
    widget.parts.text.textContent = fileLines(state, say());
    widget.parts.button.textContent = say().download;
    widget.parts.button.style.display = missingParts(state).length ? "" : "none";
  }
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
}

/* Put a line below the button; the node grows if that takes more room. */
function tell(node, text) {
  const widget = widgetOf(node);
  if (!widget) return;
  widget.parts.line.textContent = text;
  const more = widget.element.scrollHeight - widget.element.clientHeight;
  if (more <= 0) return;
  node.setSize([node.size[0], node.size[1] + more]);
  node.setDirtyCanvas(true, true);  // which is what lays the widgets out
}

async function refresh(node) {
  const name = choiceOf(node);
  const state = name ? await stateOf(name) : null;
  if (choiceOf(node) === name) show(node, state);  // else another was chosen while this was on its way
}

function chosenAnew(node) {
  tell(node, "");
  return refresh(node);
}

async function agreed(state) {
  if (state.policy === "known") return true;
  const text = question(state, say()), dialog = app.extensionManager?.dialog;
  return dialog?.confirm ? await dialog.confirm({ title: say().downloadTitle, message: text }) === true : window.confirm(text);
}

/* A prompt of one node, which has the id of the node that shows the progress. `confirmed` stands beside the workflow. */
export function prompt(clientId, nodeId, state) {
  const node = { class_type: "DiffSynthBackend_DownloadModels", inputs: { model: state.name } };
  return { client_id: clientId, prompt: { [nodeId]: node },
    extra_data: state.policy === "ask" ? { diffsynth_download: state.name } : {} };
}

async function download(node) {
  const state = await stateOf(choiceOf(node));
  if (!state) return;
  if (state.policy === "off") { tell(node, offLines(state, say())); return; }
  if (!await agreed(state)) return;
  const reply = await api.fetchApi("/prompt", { method: "POST", headers: { "Content-Type": "application/json" },
    body: JSON.stringify(prompt(api.clientId, String(node.id), state)) });
  const answer = await reply.json();
  if (reply.ok) running.set(answer.prompt_id, node);
  tell(node, reply.ok ? say().queued : say().refused(answer.error?.message ?? reply.status));
}

function watchChoice(node) {
  const widget = node.widgets?.find((candidate) => candidate.name === NODES[node.comfyClass]);
  if (!widget) return;
  const inherited = widget.callback;
  widget.callback = function () {
    const result = inherited?.apply(this, arguments);
    chosenAnew(node);
    return result;
  };
  chosenAnew(node);
}

/* The nodes of a graph that choose a known model and will run, those inside subgraphs too. */
function choosers(graph) {
  return graph._nodes.filter((node) => ![NEVER, BYPASS].includes(node.mode)).flatMap((node) =>
    node.subgraph ? choosers(node.subgraph) : node.type in NODES ? [node] : []);
}

/* Say what the nodes of a workflow lack that was just opened, each model once as long as the page is open. What was said
   of another workflow makes room. */
async function tellMissing(graph) {
  if (app.extensionManager.setting.get("Comfy.Workflow.ShowMissingModelsWarning") === false) return;
  const lacking = [];
  for (const node of choosers(graph)) {
    const name = choiceOf(node);
    const state = name && !told.has(name) ? await stateOf(name) : null;
    if (!state || !missingParts(state).length) continue;
    told.add(name);
    const size = state.bytes ? ` (${say().about(fileSize(state.bytes))})` : "";
    lacking.push(say().missingAt(node.title, name + size));
  }
  if (!lacking.length) return;
  const { toast } = app.extensionManager;
  if (notice) toast.remove(notice);
  notice = { severity: "warn", summary: say().modelsMissing, detail: say().pressDownload(lacking.join("\n")),
    life: TOAST_LIFE };
  toast.add(notice);
}

const ended = (text) => ({ detail }) => {
  const node = running.get(detail?.prompt_id);
  if (!node) return;
  running.delete(detail.prompt_id);
  tell(node, text(detail));
  refresh(node);
};

app.registerExtension({
  name: "DiffSynthBackend.Downloads",
  settings: [
    { id: "DiffSynth.Downloads", category: ["DiffSynth", "Files", "Downloads"], name: "Downloads", type: "combo",
      defaultValue: "off", options: [{ text: "off", value: "off" }, { text: "ask before each", value: "ask" },
        { text: "known models without asking", value: "known" }],
      tooltip: "What the node Download Models and the Download buttons may bring from a model hub. A workflow cannot "
        + "change it. DIFFSYNTH_DOWNLOAD_POLICY, if set where ComfyUI runs, comes before it." },
    { id: "DiffSynth.Pickles", category: ["DiffSynth", "Files", "Pickles"], name: "Pickles", type: "combo",
      defaultValue: "known", options: [{ text: "known models", value: "known" }, { text: "all", value: "all" }],
      tooltip: "Which .pth, .bin and .ckpt files a workflow may load. Nothing in them runs, but safetensors are safer. "
        + "A workflow cannot change it. DIFFSYNTH_PICKLE_POLICY, if set where ComfyUI runs, comes before it." },
    { id: "DiffSynth.Attention", category: ["DiffSynth", "Computing", "Attention"], name: "Attention", type: "combo",
      defaultValue: "auto", options: ["auto", "torch", "comfyui", "flash_attention_2", "flash_attention_3",
        "sage_attention", "xformers"],
      tooltip: "Which attention computes. auto: PyTorch's own. comfyui: as ComfyUI was started. The others need their "
        + "package. DIFFSYNTH_ATTENTION_IMPLEMENTATION, if set where ComfyUI runs, comes before it." },
  ],
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name in NODES) follow(nodeType, "onConfigure", chosenAnew);
  },
  afterConfigureGraph() {
    tellMissing(app.graph).catch(() => {});  // the server is gone: the page says so itself
  },
  nodeCreated(node) {
    if (node.comfyClass in NODES) watchChoice(node);
  },
  setup() {
    whenLanguageChanges(() => choosers(app.graph).filter(widgetOf).forEach(refresh));
    api.addEventListener("diffsynth.download", ({ detail }) => {
      const node = [...running.values()].find((candidate) => String(candidate.id) === detail.node)
        ?? nodeOf(app.graph, detail.node);
      if (node) tell(node, downloadLine(detail, say()));
    });
    api.addEventListener("execution_success", ended(() => ""));
    api.addEventListener("execution_interrupted", ended(() => ""));
    api.addEventListener("execution_error", ended((detail) => detail.exception_message ?? ""));
  },
});
