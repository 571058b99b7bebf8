import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdir, readFile, rm, writeFile } from "node:fs/promises";
import { test } from "node:test";
import { promisify } from "node:util";
import { gzipSync } from "node:zlib";
import { build } from "esbuild";

const run = promisify(execFile);

test("the core is under 3 KB, compressed, and needs nothing", async () => {
  const { outputFiles, metafile } = await build({
    entryPoints: ["dist/index.js"],
    bundle: true,
    minify: true,
    format: "esm",
    platform: "browser",
    write: false,
    metafile: true,
  });
  assert.deepEqual(Object.keys(metafile.inputs), ["dist/index.js"]);
  const size = gzipSync(outputFiles[0]?.contents ?? "", { level: 9 }).length;
  assert.ok(size > 500 && size < 3_072, `it is ${size} bytes`);
});

test("no entry point but that of React needs a package", async () => {
  for (const [entry, needs] of [
    ["index", []],
    ["casl", []],
    ["stream", []],
    ["react", ["react"]],
  ] as const) {
    const text = await readFile(`dist/${entry}.js`, "utf8");
    const from = [...text.matchAll(/^(?:import|export)\b[^;]*?from "([^"]+)"/gm)].map((m) => m[1]);
    assert.deepEqual(from, needs, entry);
  }
  const { dependencies } = JSON.parse(await readFile("package.json", "utf8"));
  assert.equal(dependencies, undefined);
});

test("the package has what it should have, and nothing else", async () => {
  const { stdout } = await run("npm", ["pack", "--dry-run", "--json", "--ignore-scripts"]);
  const told = JSON.parse(stdout);
  const [pack] = Array.isArray(told) ? told : Object.values<{ files: { path: string }[] }>(told);
  const modules = ["casl", "catalog", "cli", "index", "react", "stream"];
  assert.deepEqual(
    pack.files.map((f: { path: string }) => f.path).sort(),
    ["README.md", "package.json", ...modules.flatMap((m) => [`dist/${m}.d.ts`, `dist/${m}.js`])].sort(),
  );
  const { exports, bin } = JSON.parse(await readFile("package.json", "utf8"));
  const named = [
    ...Object.values<Record<string, string>>(exports).flatMap(Object.values),
    ...Object.values(bin),
  ];
  for (const path of named as string[]) await readFile(path);
});

test("the lock names no place", async () => {
  const lock = await readFile("package-lock.json", "utf8");
  assert.doesNotMatch(lock, /"resolved"/);
  assert.match(lock, /"integrity": "sha512-/);
});

test("the examples of the README compile", async () => {
  const readme = await readFile("README.md", "utf8");
  const blocks = [...readme.matchAll(/^```(tsx?)\n(.*?)^```$/gms)];
  assert.ok(blocks.length >= 7, `${blocks.length} examples`);
  const dir = ".build/readme";
  await rm(dir, { recursive: true, force: true });
  await mkdir(dir, { recursive: true });
  // As a project that has generated the types of its tenant.
  const { declarationsOf, parseCatalog } = await import(
    new URL("../../dist/catalog.js", import.meta.url).href
  );
  const catalog = parseCatalog({ order: ["list", "create", "cancel", "ship"] });
  await writeFile(`${dir}/permissions.d.ts`, declarationsOf(catalog));
  for (const [i, [, kind, text]] of blocks.entries())
    await writeFile(`${dir}/example${i}.${kind}`, text ?? "");
  await writeFile(
    `${dir}/tsconfig.json`,
    JSON.stringify({
      extends: "../../tsconfig.test.json",
      compilerOptions: { noEmit: true, rootDir: "../..", types: [] },
      include: ["."],
    }),
  );
  await run(process.execPath, ["node_modules/typescript/bin/tsc", "-p", dir]).catch((error) =>
    assert.fail(error.stdout),
  );
});
