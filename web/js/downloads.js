/* Below the nodes that choose a known model: its size and licence, which of its files are here, and a button that
   downloads the others as the setting DiffSynth.Downloads allows. The server reads that setting for itself; here it only
   decides whether to ask first. */
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { missingParts, prompt, question, summary, words } from "./download_words.js";
import { follow, nodeOf } from "./node_text.js";

/* The nodes, each with the widget that names a model. */
const NODES = { DiffSynthBackend_ModelLoader: "model", DiffSynthBackend_ModelConfig: "model",
  DiffSynthBackend_LoraLoader: "lora", DiffSynthBackend_DownloadModels: "model" };
const WIDGET = "files";
const HEIGHT = 112;
const TEXT_STYLE = { margin: "0", font: "11px/15px sans-serif", whiteSpace: "pre-wrap", overflowWrap: "anywhere",
  color: "var(--input-text)", userSelect: "text" };
const BOX_STYLE = { padding: "4px 6px", overflow: "auto", boxSizing: "border-box", borderRadius: "4px",
  background: "var(--comfy-input-bg)" };
const BUTTON_STYLE = { margin: "4px 0 0", padding: "2px 10px", font: "11px sans-serif", cursor: "pointer",
  color: "var(--input-text)", background: "var(--comfy-menu-bg)", border: "1px solid var(--border-color)",
  borderRadius: "4px" };

const running = new Map();  // prompt id → the node below which a download was started
const say = () => words(app.ui.settings.getSettingValue("Comfy.Locale"));

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
const choiceOf = (node) => node.widgets?.find((candidate) => candidate.name === NODES[node.comfyClass])?.value;

function show(node, state) {
  if (!state && !widgetOf(node)) return;
  const widget = widgetOf(node) ?? makeWidget(node);
  widget.element.hidden = !state;
  widget.element.style.display = state ? "" : "none";
  if (state) {
    widget.parts.text.textContent = summary(state, say());
    widget.parts.button.textContent = say().download;
    widget.parts.button.style.display = missingParts(state).length ? "" : "none";
  }
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
}

const tell = (node, text) => { if (widgetOf(node)) widgetOf(node).parts.line.textContent = text; };

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
  return dialog?.confirm ? await dialog.confirm({ title: say().title, message: text }) === true : window.confirm(text);
}

async function download(node) {
  const state = await stateOf(choiceOf(node));
  if (!state) return;
  if (state.policy === "off") { tell(node, say().off); return; }
  if (!await agreed(state)) return;
  const reply = await api.fetchApi("/prompt", { method: "POST", headers: { "Content-Type": "application/json" },
    body: JSON.stringify(prompt(api.clientId, String(node.id), state)) });
  const answer = await reply.json();
  if (reply.ok) running.set(answer.prompt_id, node);
  tell(node, reply.ok ? say().queued : `${say().failed} ${answer.error?.message ?? reply.status}`);
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
      defaultValue: "known", options: [{ text: "those of known models", value: "known" }, { text: "all", value: "all" }],
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
  nodeCreated(node) {
    if (node.comfyClass in NODES) watchChoice(node);
  },
  setup() {
    api.addEventListener("diffsynth.download", ({ detail }) => {
      const node = [...running.values()].find((candidate) => String(candidate.id) === detail.node)
        ?? nodeOf(app.graph, detail.node);
      if (node) tell(node, detail.text);
    });
    api.addEventListener("execution_success", ended(() => ""));
    api.addEventListener("execution_interrupted", ended(() => ""));
    api.addEventListener("execution_error", ended((detail) => detail.exception_message ?? ""));
  },
});
