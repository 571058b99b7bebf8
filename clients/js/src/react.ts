/**
 * Permissions for React.
 *
 * @module
 */
import {
  createContext,
  createElement,
  type ReactElement,
  type ReactNode,
  useContext,
  useEffect,
  useSyncExternalStore,
} from "react";
import type { ActionOf, Catalog, Item, Permissions, Resource, State, TypeOf } from "./index.js";

export interface CanProps<C, T extends TypeOf<C>> {
  /** The action. */
  I: ActionOf<C, T>;
  /** The type, or one resource of it. */
  a: Resource<T>;
  /** Shown where the user may not, or it is not known yet. */
  fallback?: ReactNode;
  /** Shown where the user may; a function is shown in both cases and told which. */
  children?: ReactNode | ((allowed: boolean) => ReactNode);
}

export interface PermissionsContext<C> {
  PermissionsProvider(props: { permissions: Permissions<C>; children?: ReactNode }): ReactElement;
  /** Gives the permissions, and renders again when their state changes. */
  usePermissions(): Permissions<C> & State;
  /**
   * Reports whether the user may, and renders again when that changes. About one resource it asks the server;
   * all that is rendered in one turn asks once.
   */
  useCan<T extends TypeOf<C>>(action: ActionOf<C, T>, resource: Resource<T>): boolean;
  Can<T extends TypeOf<C>>(props: CanProps<C, T>): ReactNode;
}

/** Makes a provider and hooks of their own, for a page that asks several tenants. */
export function createPermissionsContext<C = Catalog>(): PermissionsContext<C> {
  const Context = createContext<Permissions<C> | null>(null);

  const given = (): Permissions<C> => {
    const permissions = useContext(Context);
    if (!permissions) throw new Error("there is no <PermissionsProvider> above");
    return permissions;
  };

  function PermissionsProvider(props: { permissions: Permissions<C>; children?: ReactNode }) {
    return createElement(Context.Provider, { value: props.permissions }, props.children);
  }

  function usePermissions() {
    const permissions = given();
    const state = () => permissions.state;
    return { ...permissions, ...useSyncExternalStore(permissions.subscribe, state, state) };
  }

  function useCan<T extends TypeOf<C>>(action: ActionOf<C, T>, resource: Resource<T>) {
    const permissions = given();
    const [type, id] = typeof resource === "string" ? [resource] : [resource.type, resource.id];
    useEffect(() => {
      if (id !== undefined)
        void permissions.check([{ action, resource: { type, id } } as unknown as Item<C>]);
    }, [permissions, action, type, id]);
    const can = () => permissions.can(action, resource);
    return useSyncExternalStore(permissions.subscribe, can, can);
  }

  function Can<T extends TypeOf<C>>({ I, a, fallback = null, children }: CanProps<C, T>): ReactNode {
    const allowed = useCan(I, a);
    if (typeof children === "function") return children(allowed);
    return allowed ? children : fallback;
  }

  return { PermissionsProvider, usePermissions, useCan, Can };
}

// The types name Catalog, and so follow what a project declares.
type Default = PermissionsContext<Catalog>;
const context: Default = createPermissionsContext<Catalog>();
export const PermissionsProvider: Default["PermissionsProvider"] = context.PermissionsProvider;
export const usePermissions: Default["usePermissions"] = context.usePermissions;
export const useCan: Default["useCan"] = context.useCan;
export const Can: Default["Can"] = context.Can;
