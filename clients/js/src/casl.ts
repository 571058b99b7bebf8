/**
 * The permission list as rules of CASL.
 *
 * @module
 */
import type { Catalog, List, Permissions } from "./index.js";

/** A raw rule of CASL, which `new Ability(rules)` and `ability.update(rules)` take. */
export interface CaslRule {
  action: string[];
  subject: string;
}

/** Gives a rule for each type; no list gives no rules, which allow nothing. */
export function toCaslRules(list: Pick<List, "permissions"> | null): CaslRule[] {
  return Object.entries(list?.permissions ?? {})
    .filter(([, actions]) => actions.length > 0)
    .map(([subject, actions]) => ({ action: [...actions], subject }));
}

/** Keeps an ability as the list is, until the function that it returns is called. */
export function connectAbility<C = Catalog>(
  permissions: Permissions<C>,
  // biome-ignore lint/suspicious/noExplicitAny: rules of an ability of any type
  ability: { update(rules: any): unknown },
): () => void {
  let shown: List | null | undefined;
  const update = () => {
    const { list } = permissions.state;
    if (list === shown) return;
    shown = list;
    ability.update(toCaslRules(list));
  };
  update();
  return permissions.subscribe(update);
}
