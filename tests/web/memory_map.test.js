/* The sidebar: what it shows of the server's figures, and its button. */
import { beforeEach, expect, test } from "vitest";
import { api } from "./stubs/api.js";
import { app } from "./stubs/app.js";
import { render } from "../../web/js/memory_map.js";

const GIB = 1024 ** 3;
const MODEL = { name: "dit", kind: "QwenImageDiT", device_bytes: 3 * GIB, ram_bytes: 0, disk_bytes: 5 * GIB,
  adapter_bytes: 0, ring_bytes: GIB };
const PLAN = { resident_bytes: 3 * GIB, host_bytes: 0, ring_bytes: GIB, activation_bytes: GIB, bytes_per_step: 5 * GIB,
  read_bytes_per_step: 5 * GIB, once_bytes: 0, step_seconds: 1.5 };
const TRAFFIC = { passes: 8, moved_bytes: 40 * GIB, read_bytes: 40 * GIB, bandwidth: 4 * GIB, stall_seconds: 0.5,
  peak_device_bytes: 4 * GIB };
const PIPELINE = { title: "a <b>title</b>", family: "Qwen-Image", device: "cuda", dtype: "bfloat16",
  limit_bytes: 6 * GIB, counted_bytes: 4 * GIB, models: [MODEL], plan: null, traffic: null };
const state = (...pipelines) => ({ device: "cuda", device_bytes: 16 * GIB, pipelines });

let container;
beforeEach(() => {
  api.requests = [];
  container = document.createElement("div");
  document.body.replaceChildren(container);
  render(container);
});
const extension = app.extensions.find(({ name }) => name === "DiffSynthBackend.MemoryMap");
api.answers["/diffsynth_backend/memory"] = state(PIPELINE);
await extension.setup();

test("a page that opens later asks for what was said last", async () => {
  await extension.setup();
  expect(api.requests.map(({ path }) => path)).toEqual(["/diffsynth_backend/memory"]);
  expect(container.textContent).toContain("QwenImageDiT");
});

test("the tab is registered once for each page", () => {
  expect(app.tabs[0]).toMatchObject({ id: "diffsynth-memory", type: "custom" });
});

test("each place of a model has its part of the bar", () => {
  api.send("diffsynth.memory", state(PIPELINE));
  const pieces = [...container.querySelectorAll(".diffsynth-model .diffsynth-bar > div")];
  expect(pieces.map((piece) => [piece.title, parseFloat(piece.style.width).toFixed(1)])).toEqual(
    [["VRAM 3.0 GiB", "33.3"], ["staged 1.0 GiB", "11.1"], ["disk 5.0 GiB", "55.6"]]);
  expect(container.textContent).toContain("limit 6.0 GiB");
});

test("titles are text, never markup", () => {
  api.send("diffsynth.memory", state(PIPELINE));
  expect(container.querySelector("b")).toBeNull();
  expect(container.textContent).toContain("a <b>title</b>");
});

test("the plan is drawn against the limit", () => {
  api.send("diffsynth.memory", state({ ...PIPELINE, plan: PLAN, traffic: TRAFFIC }));
  const pieces = [...container.querySelectorAll(".diffsynth-plan .diffsynth-bar > div")];
  expect(pieces.map((piece) => parseFloat(piece.style.width).toFixed(1))).toEqual(["50.0", "16.7", "16.7"]);
  expect(container.querySelector(".diffsynth-plan").textContent).toContain("5.0 GiB cross per step from disk");
  expect(container.querySelector(".diffsynth-traffic").textContent).toContain("at 4.0 GiB/s");
});

test("a limit of 0 is no room to draw against", () => {
  api.send("diffsynth.memory", { ...state({ ...PIPELINE, limit_bytes: 0, plan: { ...PLAN, resident_bytes: 0 } }),
    device_bytes: null });
  const pieces = [...container.querySelectorAll(".diffsynth-plan .diffsynth-bar > div")];
  expect(pieces.map((piece) => piece.style.width)).toEqual(["50%", "50%"]);
  expect(container.textContent).toContain("limit 0: nothing stays");
});

test("what is freed goes", () => {
  api.send("diffsynth.memory", state(PIPELINE));
  api.send("diffsynth.memory", state());
  expect(container.querySelectorAll(".diffsynth-pipeline")).toHaveLength(0);
  expect(container.textContent).toContain("No model is loaded");
});

test("the button asks ComfyUI to free models and results", async () => {
  api.answers["/free"] = {};
  container.querySelector(".diffsynth-free").click();
  await Promise.resolve();
  const [{ path, method, body }] = api.requests;
  expect([path, method, JSON.parse(body)]).toEqual(["/free", "POST", { unload_models: true, free_memory: true }]);
});

test("a closed sidebar is left alone", () => {
  api.send("diffsynth.memory", state(PIPELINE));
  app.tabs[0].destroy();
  api.send("diffsynth.memory", state());
  expect(container.textContent).toContain("QwenImageDiT");
});

test("the page's language, also when it changes while the sidebar is open", async () => {
  api.send("diffsynth.memory", state({ ...PIPELINE, plan: PLAN, traffic: TRAFFIC }));
  await app.setLanguage("zh");
  for (const part of ["全部释放", "显存 3.0 GiB · 中转 1.0 GiB · 硬盘 5.0 GiB", "cuda 上以 bfloat16 计算 · 上限 6.0 GiB",
    "每步从硬盘传输 5.0 GiB，约 1.50 秒", "速度 4.0 GiB/秒"]) expect(container.textContent).toContain(part);
  expect(container.querySelector(".diffsynth-bar > div").title).toBe("显存 3.0 GiB");
  api.send("diffsynth.memory", state());
  await app.setLanguage("en");
  expect(container.textContent).toContain("No model is loaded.");
});
