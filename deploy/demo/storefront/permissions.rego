# What a page shows of "storefront". Nothing here lets a request in.
package permissions

catalog := {"product": [
	{"action": "list", "method": "GET", "path": "/storefront/products"},
	{"action": "price", "method": "PUT", "path": "/storefront/products/0"},
	{"action": "publish", "method": "POST", "path": "/storefront/products/0/publish"},
]}
