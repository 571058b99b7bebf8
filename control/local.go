package control

import "github.com/gatehouse-authz/gatehouse/bundles"

// Local returns a bundle of a directory, under a name. The place sets the
// directory apart from others; bundles of one place and resource are the same.
func Local(name, resource string, dir *bundles.Dir, place string) Bundle {
	return Bundle{
		Name: name, Resource: resource, Source: dir, Service: "dir " + place,
		MinDelay: dirMinDelay, MaxDelay: dirMaxDelay,
	}
}
