package stage

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

func listenLoopback() (net.Listener, error) { return net.Listen("tcp", "127.0.0.1:0") }

// S3Region is the region of the S3 servers.
const S3Region = "us-east-1"

// S3User is who asks an S3 server.
type S3User struct{ Access, Secret string }

// Environment is what environment_credentials read.
func (u S3User) Environment() []string {
	return []string{"AWS_ACCESS_KEY_ID=" + u.Access, "AWS_SECRET_ACCESS_KEY=" + u.Secret, "AWS_REGION=" + S3Region}
}

// S3 is a real S3 server, versitygw, whose objects are files in a folder. It can
// be stopped and started again at the same address.
type S3 struct {
	URL  string
	Root S3User // may do all

	binary, addr, dir string
	process           *Process
}

// StartS3 starts a server that keeps what it needs in dir.
func StartS3(binary, dir string) (*S3, error) {
	addr, err := FreeAddr()
	if err != nil {
		return nil, err
	}
	s := &S3{
		URL: "http://" + addr, Root: S3User{"root-of-the-stage", "a-secret-of-the-stage"},
		binary: binary, addr: addr, dir: dir,
	}
	for _, sub := range []string{"objects", "users", "attributes"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, err
		}
	}
	return s, s.Start()
}

// Start starts the server again.
func (s *S3) Start() error {
	p, err := Start("versitygw", exec.Command(s.binary,
		"--access", s.Root.Access, "--secret", s.Root.Secret, "--region", S3Region,
		"--port", s.addr, "--iam-dir", filepath.Join(s.dir, "users"), "--quiet",
		"posix", "--sidecar", filepath.Join(s.dir, "attributes"), filepath.Join(s.dir, "objects")))
	if err != nil {
		return err
	}
	s.process = p
	return p.until(func() bool {
		_, _, err := s.do(s.Root, http.MethodGet, "/", nil)
		return err == nil
	})
}

// Stop ends the server at once; its objects stay.
func (s *S3) Stop() { s.process.Kill() }

// Output returns the end of what the server printed.
func (s *S3) Output() string { return s.process.Output() }

// MakeBucket makes a bucket.
func (s *S3) MakeBucket(bucket string) error {
	return s.must(s.Root, http.MethodPut, "/"+bucket, nil)
}

// Put uploads an object.
func (s *S3) Put(bucket, key string, data []byte) error {
	return s.must(s.Root, http.MethodPut, "/"+bucket+"/"+key, data)
}

// Delete removes an object.
func (s *S3) Delete(bucket, key string) error {
	return s.must(s.Root, http.MethodDelete, "/"+bucket+"/"+key, nil)
}

// List returns the keys of a bucket.
func (s *S3) List(bucket string) ([]string, error) {
	status, body, err := s.do(s.Root, http.MethodGet, "/"+bucket+"?list-type=2", nil)
	if err != nil {
		return nil, err
	}
	if status != http.StatusOK {
		return nil, fmt.Errorf("listing bucket %s: status %d: %s", bucket, status, body)
	}
	var list struct {
		Contents []struct{ Key string }
	}
	if err := xml.Unmarshal(body, &list); err != nil {
		return nil, err
	}
	var keys []string
	for _, c := range list.Contents {
		keys = append(keys, c.Key)
	}
	return keys, nil
}

// Get asks for an object as a user, and returns the status.
func (s *S3) Get(user S3User, bucket, key string) (status int, body []byte, err error) {
	return s.do(user, http.MethodGet, "/"+bucket+"/"+key, nil)
}

// AddReader makes a user who may get the objects of a bucket whose keys match
// one of the patterns, and do nothing else.
func (s *S3) AddReader(bucket string, user S3User, patterns ...string) error {
	account := fmt.Sprintf("<Account><Access>%s</Access><Secret>%s</Secret><Role>user</Role></Account>", user.Access, user.Secret)
	if err := s.must(s.Root, http.MethodPatch, "/create-user", []byte(account)); err != nil {
		return err
	}
	var resources []string
	for _, p := range patterns {
		resources = append(resources, "arn:aws:s3:::"+bucket+"/"+p)
	}
	policy, err := json.Marshal(map[string]any{
		"Version": "2012-10-17",
		"Statement": []any{map[string]any{
			"Effect": "Allow", "Principal": map[string]any{"AWS": []string{user.Access}},
			"Action": "s3:GetObject", "Resource": resources,
		}},
	})
	if err != nil {
		return err
	}
	return s.must(s.Root, http.MethodPut, "/"+bucket+"?policy=", policy)
}

func (s *S3) must(user S3User, method, target string, data []byte) error {
	status, body, err := s.do(user, method, target, data)
	if err == nil && status/100 != 2 {
		err = fmt.Errorf("status %d: %s", status, body)
	}
	if err != nil {
		return fmt.Errorf("%s %s at the S3 server: %w", method, target, err)
	}
	return nil
}

func (s *S3) do(user S3User, method, target string, data []byte) (int, []byte, error) {
	req, err := http.NewRequest(method, s.URL+target, bytes.NewReader(data))
	if err != nil {
		return 0, nil, err
	}
	sign(req, user, data, time.Now().UTC())
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, body, errors.Join(err, resp.Body.Close())
}

// sign signs a request for S3: AWS Signature Version 4 with all of its headers
// that matter. Paths must need no escapes.
func sign(req *http.Request, user S3User, payload []byte, now time.Time) {
	stamp := now.Format("20060102T150405Z")
	scope := stamp[:8] + "/" + S3Region + "/s3/aws4_request"
	sum := sha256.Sum256(payload)
	payloadHash := hex.EncodeToString(sum[:])
	req.Header.Set("X-Amz-Date", stamp)
	req.Header.Set("X-Amz-Content-Sha256", payloadHash)

	var query []string
	for name, values := range req.URL.Query() {
		for _, v := range values {
			query = append(query, url.QueryEscape(name)+"="+url.QueryEscape(v))
		}
	}
	slices.Sort(query)
	const names = "host;x-amz-content-sha256;x-amz-date"
	canonical := strings.Join([]string{
		req.Method, req.URL.EscapedPath(), strings.Join(query, "&"),
		"host:" + req.URL.Host, "x-amz-content-sha256:" + payloadHash, "x-amz-date:" + stamp, "",
		names, payloadHash,
	}, "\n")
	hash := sha256.Sum256([]byte(canonical))
	text := "AWS4-HMAC-SHA256\n" + stamp + "\n" + scope + "\n" + hex.EncodeToString(hash[:])
	key := []byte("AWS4" + user.Secret)
	for _, part := range append(strings.Split(scope, "/"), text) {
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(part))
		key = mac.Sum(nil)
	}
	req.Header.Set("Authorization", fmt.Sprintf("AWS4-HMAC-SHA256 Credential=%s/%s, SignedHeaders=%s, Signature=%x", user.Access, scope, names, key))
}
