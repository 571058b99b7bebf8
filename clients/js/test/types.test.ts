// What must compile, and what must not. Nothing here is run but the last line.
import { test } from "node:test";
import { createPermissions, type Permissions } from "@gatehouse-authz/permissions";
import { connectAbility } from "@gatehouse-authz/permissions/casl";
import { createPermissionsContext, useCan } from "@gatehouse-authz/permissions/react";

interface Orders {
  order: "list" | "cancel";
  report: "view";
}

export async function typed(may: Permissions<Orders>, any: Permissions) {
  const yes: boolean = may.can("cancel", "order");
  may.can("view", { type: "report", id: "1" });
  // @ts-expect-error: an action of another type
  may.can("view", "order");
  // @ts-expect-error: a slip
  may.can("cancle", "order");
  // @ts-expect-error: no such type
  may.can("list", "invoice");
  // @ts-expect-error: an ID without a type
  may.can("list", { id: "1" });
  // @ts-expect-error: type and action change places
  may.can("order", "list");

  const answers: boolean[] = await may.check([{ action: "cancel", resource: { type: "order", id: "1" } }]);
  // @ts-expect-error: a type is no resource
  may.check([{ action: "cancel", resource: "order" }]);
  // @ts-expect-error: an action of another type
  may.check([{ action: "view", resource: { type: "order", id: "1" } }]);
  // @ts-expect-error: it is a picture
  may.state.status = "ready";

  any.can("whatever", "anything");
  // @ts-expect-error: no words at all
  any.can();
  connectAbility(may, { update: () => {} });
  return [yes, answers];
}

export function useWords() {
  const { Can, useCan: useOrders } = createPermissionsContext<Orders>();
  useOrders("list", "order");
  // @ts-expect-error: no such action
  useOrders("ship", "order");
  useCan("anything", { type: "goes", id: "1" });
  Can({ I: "view", a: "report", children: "x" });
  // @ts-expect-error: an action of another type
  Can({ I: "cancel", a: "report" });
}

// @ts-expect-error: a list has an address
export const none = () => createPermissions({});

test("types", () => {});
