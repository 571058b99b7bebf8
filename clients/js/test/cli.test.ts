import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdir, readFile, rm, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { before, test } from "node:test";

const catalog = {
  report: ["view"],
  order: ["ship", { action: "cancel", method: "DELETE", path: "/orders/0" }, "ship"],
  'odd "type"': [],
};
const dir = ".build/cli";
before(async () => {
  await rm(dir, { recursive: true, force: true });
  await mkdir(dir, { recursive: true });
});

interface Ran {
  code: number;
  out: string;
  err: string;
}
const run = (command: string, args: string[], env = {}, input = ""): Promise<Ran> =>
  new Promise((resolve) => {
    const child = execFile(
      process.execPath,
      [command, ...args],
      { env: { ...process.env, ...env } },
      (error, out, err) => {
        resolve({ code: typeof error?.code === "number" ? error.code : 0, out, err });
      },
    );
    child.stdin?.end(input);
  });
const cli = (args: string[], env = {}, input = "") => run("dist/cli.js", args, env, input);
const tsc = (files: string[]) =>
  run("node_modules/typescript/bin/tsc", [
    "--ignoreConfig",
    "--noEmit",
    "--strict",
    "--target",
    "es2022",
    "--module",
    "nodenext",
    "--types",
    "",
    ...files,
  ]);

test("types of a catalogue make a wrong word a fault", async () => {
  await writeFile(`${dir}/catalog.json`, JSON.stringify(catalog));
  const { code, out, err } = await cli([`${dir}/catalog.json`]);
  assert.deepEqual([code, err], [0, ""]);
  assert.match(out, /"odd \\"type\\"": never;\n {2}"order": "cancel" \| "ship";\n {2}"report": "view";/);
  await writeFile(`${dir}/permissions.d.ts`, out);
  const page = (lines: string[]) =>
    `import { createPermissions } from "@gatehouse-authz/permissions";
const may = createPermissions({ url: "/x" });
${lines.join("\n")}
export {};
`;
  await writeFile(
    `${dir}/good.ts`,
    page(['may.can("ship", "order");', 'may.can("view", { type: "report", id: "1" });']),
  );
  const good = await tsc([`${dir}/permissions.d.ts`, `${dir}/good.ts`]);
  assert.equal(good.code, 0, good.out);
  await writeFile(
    `${dir}/bad.ts`,
    page(['may.can("shp", "order");', 'may.can("ship", "report");', 'may.can("ship", "ordr");']),
  );
  const bad = await tsc([`${dir}/permissions.d.ts`, `${dir}/bad.ts`]);
  assert.deepEqual(
    [...bad.out.matchAll(/bad\.ts\((\d+)/g)].map((m) => m[1]),
    ["3", "4", "5"],
    bad.out,
  );
});

test("with a name they are an interface", async () => {
  const { out } = await cli(
    ["--name", "Storefront", "-"],
    {},
    JSON.stringify({ catalog: { product: ["price"] } }),
  );
  assert.match(out, /^\/\/ .*\nexport interface Storefront \{\n {2}"product": "price";\n\}\n$/);
});

test("a URL is asked with the token", async () => {
  const server = createServer((request, response) => {
    if (request.headers.authorization !== "Bearer abc") return response.writeHead(401).end();
    return response.end(JSON.stringify({ tenant: "orders", catalog }));
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/t/orders/v1/permissions/catalog`;
  assert.match((await cli([url], { GATEHOUSE_TOKEN: "abc" })).out, /"cancel" \| "ship"/);
  const refused = await cli([url]);
  assert.equal(refused.code, 1);
  assert.match(refused.err, /status 401/);
  server.close();
});

test("bad input is named", async () => {
  for (const [input, want] of [
    ["[]", /an object of types/],
    ["{", /reading -: /],
    ['{"order": "list"}', /the actions of "order" are not a list/],
    ['{"order": [7]}', /action 0 of "order" is 7, not a name/],
    ['{"order": [{"method": "GET"}]}', /action 0 of "order"/],
  ] as const) {
    const { code, out, err } = await cli(["-"], {}, input);
    assert.deepEqual([code, out], [1, ""], input);
    assert.match(err, want);
  }
  assert.equal((await cli(["--name", "a-b", "-"], {}, "{}")).code, 1);
  assert.equal((await cli([])).code, 2);
  assert.equal((await cli(["--nam", "x", "-"])).code, 2);
  assert.equal((await cli(["--help"])).code, 0);
  assert.ok((await readFile("dist/cli.js", "utf8")).startsWith("#!/usr/bin/env node\n"));
});
