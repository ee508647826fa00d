/* The page's own modules are replaced by stubs; ComfyUI serves them beside the extensions. */
import { fileURLToPath } from "node:url";
import { defineConfig } from "vitest/config";

const stub = (name) => fileURLToPath(new URL(`./stubs/${name}.js`, import.meta.url));

export default defineConfig({
  test: { environment: "jsdom", include: ["*.test.js"], dir: "." },
  resolve: { alias: [{ find: /^(\.\.\/)+scripts\/(app|api)\.js$/, replacement: stub("$2") }] },
  server: { fs: { allow: ["../.."] } },
});
