// Drives a node through a client that OpenAPI Generator made from docs/openapi.yaml.
//
// Usage: drive CONTROL-SOCKET LAYER UPPER-DIRECTORY
package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"

	ovbd "ovbd"
)

// check ends the program if an answer is not the expected one.
func check(what string, answer *http.Response, err error, status int) {
	if answer == nil || answer.StatusCode != status || (status < 300 && err != nil) {
		fmt.Println(what, answer, err)
		os.Exit(1)
	}
}

func expect(what string, holds bool) {
	if !holds {
		fmt.Println("does not hold:", what)
		os.Exit(1)
	}
}

func main() {
	control, layer, upper := os.Args[1], os.Args[2], os.Args[3]
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var dialer net.Dialer
			return dialer.DialContext(ctx, "unix", control)
		},
	}
	configuration := ovbd.NewConfiguration()
	configuration.HTTPClient = &http.Client{Transport: transport}
	api := ovbd.NewAPIClient(configuration).DefaultAPI
	ctx := context.Background()

	spec := ovbd.NewDiskSpec()
	spec.SetLayers([]string{layer})
	spec.SetUpper(*ovbd.NewDiskSpecUpper(upper))
	spec.SetLabels(map[string]string{"team": "a b"})
	limits := ovbd.NewLimits()
	limits.SetOps(*ovbd.NewBucket(5000, 1000))
	spec.SetLimits(*limits)
	spec.SetTakeover("never")
	_, answer, err := api.PutDisk(ctx, "a").DiskSpec(*spec).Validate(true).Execute()
	check("validate", answer, err, 204)
	made, answer, err := api.PutDisk(ctx, "a").DiskSpec(*spec).IfNoneMatch("*").Execute()
	check("put", answer, err, 201)
	expect("the disk listens", made.GetState() == "listening" && made.GetGeneration() == 1)
	made, answer, err = api.PutDisk(ctx, "a").DiskSpec(*spec).Execute()
	check("put again", answer, err, 200)
	madeLimits := made.GetLimits()
	ops := madeLimits.GetOps()
	expect("the limit is set", ops.GetSize() == 5000 && made.GetTakeover() == "never")

	patch := ovbd.NewDiskPatch()
	y := "y"
	patch.SetLabels(map[string]*string{"x": &y})
	made, answer, err = api.PatchDisk(ctx, "a").DiskPatch(*patch).IfMatch("\"1\"").Execute()
	check("patch", answer, err, 200)
	expect("the generation", made.GetGeneration() == 2)
	_, answer, err = api.PatchDisk(ctx, "a").DiskPatch(*patch).IfMatch("\"1\"").Execute()
	check("patch of another generation", answer, err, 412)
	refused, _ := err.(*ovbd.GenericOpenAPIError)
	failure, _ := refused.Model().(ovbd.Error)
	expect("the error has its model", failure.GetCode() == "changed")

	grown, answer, err := api.ResizeDisk(ctx, "a").ResizeDiskRequest(*ovbd.NewResizeDiskRequest(8 << 20)).Execute()
	check("resize", answer, err, 200)
	expect("the size", grown.GetSizeBytes() == 8<<20)
	wanted := ovbd.NewMakeSnapshotRequest("s")
	wanted.SetWait(true)
	taken, answer, err := api.MakeSnapshot(ctx, "a").MakeSnapshotRequest(*wanted).Execute()
	check("snapshot", answer, err, 200)
	expect("the snapshot is sealed", taken.GetSealed() && len(taken.GetLayers()) > 0)
	fork := ovbd.NewDiskSpec()
	fork.SetFrom(*ovbd.NewDiskSpecFrom("a", "s"))
	_, answer, err = api.PutDisk(ctx, "b").DiskSpec(*fork).Execute()
	check("fork", answer, err, 201)

	page, answer, err := api.ListDisks(ctx).Limit(1).Label([]string{"x=y"}).Execute()
	check("list", answer, err, 200)
	expect("one disk has the label", len(page.Disks) == 1 && page.Disks[0].GetId() == "a")
	page, answer, err = api.ListDisks(ctx).Limit(1).Execute()
	check("page", answer, err, 200)
	expect("more disks follow", page.GetNext() == "a")
	stats, answer, err := api.GetDiskStats(ctx, "a").Execute()
	check("stats", answer, err, 200)
	expect("the size in the counters", stats.GetSizeBytes() == 8<<20)
	images, answer, err := api.ListImages(ctx).Execute()
	check("images", answer, err, 200)
	expect("two images", len(images.Images) == 2)
	config, answer, err := api.GetConfig(ctx).Execute()
	check("config", answer, err, 200)
	expect("two specifications", len(config.Disks) == 2 && len(config.Damaged) == 0)
	events, answer, err := api.ListEvents(ctx).After(0).Execute()
	check("events", answer, err, 200)
	expect("events", len(events.Events) > 2)
	text, answer, err := api.GetMetrics(ctx).Execute()
	check("metrics", answer, err, 200)
	expect("metrics", strings.Contains(text, "ovbd_disks"))
	for _, id := range []string{"a", "b"} {
		answer, err = api.DeleteDisk(ctx, id).Force(true).Execute()
		check("delete", answer, err, 204)
	}
	_, answer, err = api.GetDisk(ctx, "a").Execute()
	check("get of a removed disk", answer, err, 404)
	fmt.Println("done")
}
