# What a page may ask about areas and their items: requests that the roles cover,
# and others.
package permissions

catalog[area] := [action |
	some item in numbers.range(0, 4)
	action := {
		"action": sprintf("item-%d", [item]),
		"method": "GET",
		"path": sprintf("/%s/1/item-%d/notes", [area, item]),
	}
] if {
	some number in numbers.range(0, 9)
	area := sprintf("area-%d", [number])
}
