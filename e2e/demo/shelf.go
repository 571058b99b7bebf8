package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

const bucket = "bundles"

// shelf is an S3 bucket with the bundles of the tenants.
type shelf struct {
	*stage.S3
	tenants string // the folder that they are made from
}

// newShelf starts an S3 server and uploads a bundle of each tenant.
func newShelf(binary, dir, tenants string) (*shelf, error) {
	s3, err := stage.StartS3(binary, filepath.Join(dir, "s3"))
	if err != nil {
		return nil, err
	}
	s := &shelf{S3: s3, tenants: tenants}
	if err := s.fill(); err != nil {
		s3.Stop()
		return nil, err
	}
	return s, nil
}

func (s *shelf) fill() error {
	if err := s.MakeBucket(bucket); err != nil {
		return err
	}
	folders, err := os.ReadDir(s.tenants)
	if err != nil {
		return err
	}
	for _, f := range folders {
		if err := s.upload(f.Name()); err != nil {
			return err
		}
	}
	return nil
}

// upload makes a bundle of a tenant's folder and puts it into the bucket.
func (s *shelf) upload(tenant string) error {
	files := map[string]string{}
	folder := os.DirFS(filepath.Join(s.tenants, tenant))
	err := fs.WalkDir(folder, ".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		text, err := fs.ReadFile(folder, path)
		files[path] = string(text)
		return err
	})
	if err != nil {
		return err
	}
	return s.Put(bucket, tenant+".tar.gz", stage.Bundle(files))
}

// config has gatehouse fetch the bundles, with the credentials of its
// environment.
func (s *shelf) config() string {
	return fmt.Sprintf(`
opa:
  services:
    s3:
      url: %s/%s
      credentials: {s3_signing: {environment_credentials: {}}}
  bundles:
    policy:
      service: s3
      resource: "{{ .tenant }}.tar.gz"
      polling: {min_delay_seconds: 1, max_delay_seconds: 1}
`, s.URL, bucket)
}

// change says how to change the policy of a tenant.
func (s *shelf) change(tenant string) string {
	folder := filepath.Join(s.tenants, tenant)
	return fmt.Sprintf(`Change a policy in %[1]s, upload it

  tar -czf %[1]s.tar.gz -C %[1]s .
  curl -T %[1]s.tar.gz --aws-sigv4 aws:amz:%[2]s:s3 -u %[3]s:%[4]s %[5]s/%[6]s/%[7]s.tar.gz
`, folder, stage.S3Region, s.Root.Access, s.Root.Secret, s.URL, bucket, tenant)
}
