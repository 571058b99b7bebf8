package policy

// Remembered returns how many values the builtins have left in env, in the cache
// of that name; "" is the one without.
func (env *Env) Remembered(name string) int {
	c := &env.values.valueCache
	if name != "" {
		env.values.naming.RLock()
		c = env.values.named[name]
		env.values.naming.RUnlock()
	}
	if c == nil {
		return 0
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.items == nil {
		return 0
	}
	return c.items.Len()
}

// Swap has each of two entry points answered by the plan of the other.
func (p *Policy) Swap(a, b string) {
	p.entries[a].program, p.entries[b].program = p.entries[b].program, p.entries[a].program
}
