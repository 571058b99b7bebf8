#!/usr/bin/env node
// gatehouse-permissions-types writes the types of a tenant's catalogue to standard output. Exit status: 0; 1 when
// the catalogue cannot be read; 2 on bad usage.
import { readFile } from "node:fs/promises";
import { parseArgs } from "node:util";
import { declarationsOf, parseCatalog } from "./catalog.js";

const usage = `usage: gatehouse-permissions-types [--name NAME] CATALOG > permissions.d.ts

CATALOG is a URL such as https://example.com/t/orders/v1/permissions/catalog, a file, or - for standard input.

  --name NAME    write an interface of this name, for createPermissions<NAME>,
                 and leave the types of other tenants alone

A token in GATEHOUSE_TOKEN is sent to a URL as a bearer token.
`;

async function read(from: string): Promise<string> {
  if (from === "-") {
    let text = "";
    for await (const chunk of process.stdin.setEncoding("utf8")) text += chunk;
    return text;
  }
  if (!/^https?:\/\//.test(from)) return readFile(from, "utf8");
  const token = process.env.GATEHOUSE_TOKEN;
  const response = await fetch(from, {
    headers: { accept: "application/json", ...(token ? { authorization: `Bearer ${token}` } : {}) },
    signal: AbortSignal.timeout(10_000),
  });
  if (!response.ok) throw new Error(`the server answered with status ${response.status}`);
  return response.text();
}

async function main(): Promise<number> {
  let name: string | undefined;
  let from: string | undefined;
  try {
    const { values, positionals } = parseArgs({
      options: { name: { type: "string" }, help: { type: "boolean", short: "h" } },
      allowPositionals: true,
    });
    if (values.help) {
      process.stdout.write(usage);
      return 0;
    }
    if (positionals.length !== 1) throw new Error("one catalogue is needed");
    name = values.name;
    from = positionals[0] as string;
  } catch (cause) {
    process.stderr.write(`gatehouse-permissions-types: ${(cause as Error).message}\n\n${usage}`);
    return 2;
  }
  try {
    process.stdout.write(declarationsOf(parseCatalog(JSON.parse(await read(from))), name));
    return 0;
  } catch (cause) {
    process.stderr.write(`gatehouse-permissions-types: reading ${from}: ${(cause as Error).message}\n`);
    return 1;
  }
}

process.exitCode = await main();
