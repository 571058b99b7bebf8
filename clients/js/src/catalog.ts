/** Reads a catalogue and writes it as types. */

/** :: type → its actions, both sorted */
export type Actions = Map<string, string[]>;

const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null && !Array.isArray(value);

const quoted = (value: unknown) => JSON.stringify(value) ?? String(value);

/**
 * Reads `{type: [action | {action, method, path}]}`, as a policy has it, or `{"catalog": {...}}` around it, as the
 * server sends it.
 */
export function parseCatalog(value: unknown): Actions {
  const inner = isObject(value) && (isObject(value.catalog) ? value.catalog : value);
  if (!inner) throw new Error("a catalogue is an object of types and their actions");
  const catalog: Actions = new Map();
  for (const [type, list] of Object.entries(inner)) {
    // Beside the catalogue that a policy has, nothing else stands in it.
    if (!Array.isArray(list)) throw new Error(`the actions of ${quoted(type)} are not a list`);
    const actions = list.map((entry: unknown, i) => {
      const action = isObject(entry) ? entry.action : entry;
      if (typeof action !== "string" || action === "")
        throw new Error(`action ${i} of ${quoted(type)} is ${quoted(entry)}, not a name`);
      return action;
    });
    catalog.set(type, [...new Set(actions)].sort());
  }
  return new Map([...catalog].sort(([a], [b]) => (a < b ? -1 : 1)));
}

/**
 * Writes the declarations. Without a name they make `can` typed everywhere; with one they are an interface to
 * hand to `createPermissions<Name>`.
 */
export function declarationsOf(catalog: Actions, name?: string): string {
  if (name !== undefined && !/^[A-Za-z_$][\w$]*$/.test(name))
    throw new Error(`${quoted(name)} is not a name for a type`);
  const members = [...catalog].map(([type, actions]) => {
    return `  ${quoted(type)}: ${actions.map(quoted).join(" | ") || "never"};\n`;
  });
  const head = "// Written by gatehouse-permissions-types from the catalogue of a tenant. Do not edit.\n";
  const body = `export interface ${name ?? "Actions"} {\n${members.join("")}}\n`;
  if (name !== undefined) return head + body;
  return `${head}import '@gatehouse-authz/permissions';

${body}
declare module '@gatehouse-authz/permissions' {
  interface Register {
    catalog: Actions;
  }
}
`;
}
