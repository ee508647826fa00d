/* The files of a known model below a node: what is said, who is asked, and what is queued. */
import { beforeEach, expect, test, vi } from "vitest";
import { api } from "./stubs/api.js";
import { app } from "./stubs/app.js";
import { makeNode } from "./helpers.js";
import { prompt } from "../../web/js/downloads.js";

const LOADER = "DiffSynthBackend_ModelLoader";
const extension = app.extensions.find(({ name }) => name === "DiffSynthBackend.Downloads");
const PARTS = [{ title: "vae", bytes: 253_800_000, model_id: "Qwen/Qwen-Image", pattern: "vae/x.safetensors" },
  { title: "transformer", bytes: null, model_id: "Qwen/Qwen-Image", pattern: "transformer/*.safetensors" }];
const state = (policy) => ({ name: "qwen-image", title: "Qwen-Image", policy, bytes: 57.7e9, licences: ["Apache-2.0"],
  parts: PARTS });

let node;
const box = () => node.widgets.find(({ name }) => name === "files")?.element;
const text = () => box().querySelector("pre").textContent;
const button = () => box().querySelector("button");
const line = () => box().querySelector(".diffsynth-download").textContent;
const settle = () => vi.waitFor(() => expect(api.pending ?? 0).toBe(0)).then(() => new Promise((go) => setTimeout(go)));

async function create(answer, type = LOADER) {
  api.answers = { "/diffsynth_backend/models": answer, "/prompt": { prompt_id: "p1" } };
  node = makeNode(type, { model: "qwen-image" }, { id: 7, comfyClass: type });
  extension.nodeCreated(node);
  await settle();
}

const queued = () => api.requests.filter(({ path }) => path === "/prompt").map(({ body }) => JSON.parse(body));

beforeEach(() => {
  app.settings = { "Comfy.Locale": "en" };
  app.toasts = [];
  api.requests = [];
  api.clientId = "me";
  app.extensionManager.dialog = { confirm: vi.fn(async () => true) };
  app.graph = { getNodeById: (id) => (Number(id) === 7 ? node : null) };
});

test("the user's word stands beside the workflow, and only if one was asked", () => {
  expect(prompt("me", "7", state("ask"))).toEqual({ client_id: "me", extra_data: { diffsynth_download: "qwen-image" },
    prompt: { 7: { class_type: "DiffSynthBackend_DownloadModels", inputs: { model: "qwen-image" } } } });
  expect(prompt("me", "7", state("known")).extra_data).toEqual({});
});

test("names of files are set as text", async () => {
  await create({ ...state("off"), title: "<img src=x onerror=alert(1)>" });
  expect(text()).toContain("<img src=x");
  expect(box().querySelector("img")).toBe(null);
});

test("nothing is shown for what nobody can download", async () => {
  await create(null);
  expect(box()).toBe(undefined);
});

test("another choice shows its own files, and none hides them", async () => {
  await create(state("off"));
  api.answers["/diffsynth_backend/models"] = null;
  node.widgets[0].value = "demo";
  node.widgets[0].callback("demo");
  await settle();
  expect(box().hidden).toBe(true);
  expect(api.requests.at(-1).path).toBe("/diffsynth_backend/models?name=demo");
});

test("a complete model has no button", async () => {
  await create({ ...state("known"), parts: [PARTS[0]] });
  expect(button().style.display).toBe("none");
});

test("off: the button says where to switch it on, and queues nothing", async () => {
  await create(state("off"));
  button().click();
  await settle();
  expect(line()).toContain("Settings, DiffSynth, Downloads");
  expect(line()).toContain("Or by hand: Qwen/Qwen-Image (transformer/*.safetensors)");
  expect(queued()).toEqual([]);
});

test("ask: queued after a yes, not after a no", async () => {
  await create(state("ask"));
  app.extensionManager.dialog.confirm.mockResolvedValueOnce(false);
  button().click();
  await settle();
  expect(queued()).toEqual([]);
  button().click();
  await settle();
  expect(queued()).toEqual([prompt("me", "7", state("ask"))]);
  expect(line()).toBe("waiting for its turn");
});

test("known: queued at once; how far it is, and then what is here", async () => {
  await create(state("known"));
  button().click();
  await settle();
  expect(app.extensionManager.dialog.confirm).not.toHaveBeenCalled();
  extension.setup();
  api.send("diffsynth.download", { node: "7", file: "model.safetensors", done_bytes: 1e9, total_bytes: 2e9,
    bytes_per_second: 1e7 });
  expect(line()).toBe("model.safetensors · 1.0 GB of 2.0 GB · 10.0 MB/s · 1 min left");
  api.answers["/diffsynth_backend/models"] = { ...state("known"), parts: [PARTS[0]] };
  api.send("execution_success", { prompt_id: "p1" });
  await settle();
  expect(line()).toBe("");
  expect(text()).toContain("complete");
});

test("an error is shown below the node that asked", async () => {
  await create(state("known"));
  button().click();
  await settle();
  api.send("execution_error", { prompt_id: "p1", exception_message: "the disk is full" });
  await settle();
  expect(line()).toBe("the disk is full");
});

test("the page's language is that of the box and of the question", async () => {
  app.settings["Comfy.Locale"] = "zh";
  await create(state("ask"));
  expect([text(), button().textContent]).toEqual(
    ["Qwen-Image · 约 57.7 GB · Apache-2.0\n✓ vae 253.8 MB\n✗ 缺少：transformer", "下载"]);
  button().click();
  await settle();
  expect(app.extensionManager.dialog.confirm.mock.calls[0][0].title).toBe("下载模型？");
  expect(line()).toBe("排队中");
  app.graph._nodes = [node];
  await app.setLanguage("en");
  await settle();
  expect([text().split("\n")[2], button().textContent]).toEqual(["✗ missing: transformer", "Download"]);
});

async function open(...nodes) {
  app.graph = { _nodes: nodes };
  extension.afterConfigureGraph();
  await settle();
}

const chooser = (model, more = {}) => makeNode(LOADER, { model }, { title: "Loader", mode: 0, ...more });

test("an opened workflow says what it lacks, once", async () => {
  api.answers = { "/diffsynth_backend/models": state("off") };
  for (let time = 0; time < 2; time += 1) await open(chooser("told once"), makeNode("KSampler", { model: "x" }));
  expect(app.toasts).toHaveLength(1);
  expect(app.toasts[0].detail).toBe(
    "Loader: told once (about 57.7 GB). The button Download below the node brings them.");
});

test("what is said of a workflow makes room for what is said of the next", async () => {
  api.answers = { "/diffsynth_backend/models": state("off") };
  for (const model of ["of the first", "of the second"]) await open(chooser(model));
  await open(makeNode("KSampler", { model: "x" }));
  expect(app.toasts.map(({ detail }) => detail.split(" (")[0])).toEqual(["Loader: of the second"]);
});

test("also of nodes in a subgraph, and not of those that do not run or lack nothing", async () => {
  api.answers = { "/diffsynth_backend/models": state("off") };
  await open(chooser("muted", { mode: 2 }), chooser("bypassed", { mode: 4 }),
    { mode: 0, subgraph: { _nodes: [chooser("inside", { title: "Inner" })] } });
  expect(app.toasts.map(({ detail }) => detail.split(":")[0])).toEqual(["Inner"]);
  api.answers = { "/diffsynth_backend/models": { ...state("off"), parts: [PARTS[0]] } };
  await open(chooser("here"));
  app.settings["Comfy.Workflow.ShowMissingModelsWarning"] = false;
  api.answers = { "/diffsynth_backend/models": state("off") };
  await open(chooser("unwanted"));
  expect(app.toasts).toHaveLength(1);
});
