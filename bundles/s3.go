package bundles

import (
	"bytes"
	"io"
	"net/url"
	"strings"
)

// s3AccessDenied is S3's code for what may not be done. Its other codes with
// status 403 are about the credentials or the request.
const s3AccessDenied = "AccessDenied"

// s3Reason reads the code from an error of S3: <Error><Code>NoSuchKey</Code>…
// It returns "" for an empty answer, and "unknown" for one that is none of S3's.
func s3Reason(body io.Reader) (string, error) {
	page, err := io.ReadAll(io.LimitReader(body, maxErrorPage))
	if err != nil {
		return "", err
	}
	if len(page) == 0 {
		return "", nil
	}
	_, after, _ := bytes.Cut(page, []byte("<Error"))
	_, after, _ = bytes.Cut(after, []byte("<Code>"))
	code, _, found := bytes.Cut(after, []byte("</Code>"))
	letter := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.'
	}
	if !found || len(code) == 0 || len(code) > 64 || len(bytes.TrimFunc(code, letter)) > 0 {
		return "unknown", nil
	}
	return string(code), nil
}

// s3Escape writes a URL as S3 does when it checks a signature: each byte but
// letters, digits, "-", ".", "_", "~" and the slashes of the path escaped, and
// the query sorted. A signature over another spelling does not match.
func s3Escape(u *url.URL) {
	segments := strings.Split(u.Path, "/")
	for i, s := range segments {
		segments[i] = strings.ReplaceAll(url.QueryEscape(s), "+", "%20")
	}
	u.RawPath = strings.Join(segments, "/")
	if query, err := url.ParseQuery(u.RawQuery); err == nil {
		u.RawQuery = strings.ReplaceAll(query.Encode(), "+", "%20")
	}
}
