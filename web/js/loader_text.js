/* Shows the result of a node below its inputs: what the Model Loader recognised and plans, which models a LoRA fits,
   where a new one was saved, what Denoise has moved; and while a model is loaded, how far that is. */
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { loadingLine } from "./lines.js";
import { clearText, follow, nodeOf, showText, textOf } from "./node_text.js";
import { say } from "./words.js";

/* The nodes, and whether their text is about one run only: that goes when the next one begins. */
const NODES = { DiffSynthBackend_ModelLoader: false, DiffSynthBackend_LoraLoader: false,
  DiffSynthBackend_LoraStack: false, DiffSynthBackend_ApplyLora: false, DiffSynthBackend_ImageToLora: false,
  DiffSynthBackend_Denoise: true };
const LOADER = "DiffSynthBackend_ModelLoader";

const loading = new Set();  // nodes that show how far they are

function progressed({ detail }) {
  const node = nodeOf(app.graph, detail.node);
  if (node?.type !== LOADER) return;
  loading.add(node);
  showText(node, loadingLine(detail, say()));
}

function stopped() {
  for (const node of loading) showText(node, `${textOf(node)} · ${say().stopped}`);
  loading.clear();
}

app.registerExtension({
  name: "DiffSynthBackend.LoaderText",
  setup() {
    api.addEventListener("diffsynth.loading", progressed);
    for (const end of ["execution_interrupted", "execution_error"]) api.addEventListener(end, stopped);
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!(nodeData.name in NODES)) return;
    follow(nodeType, "onExecuted", (node, output) => {
      loading.delete(node);
      if (output?.text) showText(node, [output.text].flat().join("\n"));
    });
    if (NODES[nodeData.name]) follow(nodeType, "onExecutionStart", clearText);
  },
});
