package log_test

import data.system.log

test_the_card_is_masked if {
	"/input/parsed_body/card" in log.mask with input as {}
}

test_public_reads_are_dropped if {
	log.drop with input as {
		"result": {"allowed": true},
		"input": {"attributes": {"request": {"http": {"method": "GET"}}}, "parsed_path": ["public", "logo"]},
	}
}
