package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"sort"
	"strings"
	"sync"
	"time"
)

var prompts = map[string]string{
	"plain":  `{"model":"google/gemini-2.5-flash-lite","messages":[{"role":"user","content":"Hello"}]}`,
	"stream": `{"model":"google/gemini-2.5-flash-lite","messages":[{"role":"user","content":"Hello"}],"stream":true}`,
	"paced":  `{"model":"google/gemini-2.5-flash-lite","messages":[{"role":"user","content":"pause=5"}],"stream":true}`,
	"idle":   `{"model":"google/gemini-2.5-flash-lite","messages":[{"role":"user","content":"pause=250"}],"stream":true}`,
}

// What the load generator measured; times in milliseconds.
type result struct {
	Requests   int     `json:"requests"`
	Errors     int     `json:"errors"`
	Seconds    float64 `json:"seconds"`
	P50        float64 `json:"p50_ms"`
	P99        float64 `json:"p99_ms"`
	FirstP50   float64 `json:"first_byte_p50_ms"`
	FirstP99   float64 `json:"first_byte_p99_ms"`
	FirstError string  `json:"first_error"`
}

// Durations in milliseconds: of whole responses, and until their first byte.
type client struct {
	whole, first []float64
	errors       int
	firstError   string
}

func load(arguments []string) error {
	flags := flag.NewFlagSet("load", flag.ExitOnError)
	url := flags.String("url", "", "address of chat/completions")
	keys := flags.String("keys", "", "file of API keys, one per line; the clients take turns")
	kind := flags.String("kind", "plain", "plain, stream, paced or idle")
	clients := flags.Int("clients", 1, "concurrent clients")
	seconds := flags.Float64("seconds", 3, "duration")
	flags.Parse(arguments)
	credentials := []string{"none"}
	if *keys != "" {
		read, err := os.ReadFile(*keys)
		if err != nil {
			return err
		}
		credentials = strings.Fields(string(read))
	}
	httpClient := &http.Client{Transport: &http.Transport{MaxIdleConns: *clients, MaxIdleConnsPerHost: *clients, DisableCompression: true}}
	started := time.Now()
	end := started.Add(time.Duration(*seconds * float64(time.Second)))
	all := make([]client, *clients)
	var group sync.WaitGroup
	for number := range all {
		group.Add(1)
		go func(own *client, key string) {
			defer group.Done()
			buffer := make([]byte, 64*1024)
			for time.Now().Before(end) {
				own.send(httpClient, *url, key, prompts[*kind], *kind != "plain", buffer)
			}
		}(&all[number], credentials[number%len(credentials)])
	}
	group.Wait()
	return json.NewEncoder(os.Stdout).Encode(sum(all, time.Since(started).Seconds()))
}

func (own *client) send(httpClient *http.Client, url, key, prompt string, stream bool, buffer []byte) {
	started := time.Now()
	request, _ := http.NewRequest(http.MethodPost, url, strings.NewReader(prompt))
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("Authorization", "Bearer "+key)
	response, err := httpClient.Do(request)
	if err != nil {
		own.fail(err.Error())
		return
	}
	defer response.Body.Close()
	var first time.Duration
	var tail []byte
	size := 0
	for {
		count, err := response.Body.Read(buffer)
		if count > 0 {
			if size == 0 {
				first = time.Since(started)
			}
			size += count
			tail = append(tail, buffer[max(0, count-32):count]...)
			tail = tail[max(0, len(tail)-32):]
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			own.fail(err.Error())
			return
		}
	}
	whole := bytes.HasSuffix(tail, []byte("}")) && size > plainBytes/2
	if stream {
		whole = bytes.HasSuffix(tail, []byte("data: [DONE]\n\n")) && size > chunks*100
	}
	if response.StatusCode != http.StatusOK || !whole {
		own.fail(fmt.Sprintf("status %d, %d bytes, …%s", response.StatusCode, size, tail))
		return
	}
	own.whole = append(own.whole, milliseconds(time.Since(started)))
	own.first = append(own.first, milliseconds(first))
}

func (own *client) fail(message string) {
	own.errors++
	if own.firstError == "" {
		own.firstError = message
	}
	time.Sleep(10 * time.Millisecond)
}

func sum(all []client, seconds float64) result {
	total := result{Seconds: seconds}
	var whole, first []float64
	for _, own := range all {
		whole = append(whole, own.whole...)
		first = append(first, own.first...)
		total.Errors += own.errors
		if total.FirstError == "" {
			total.FirstError = own.firstError
		}
	}
	total.Requests = len(whole)
	total.P50, total.P99 = percentiles(whole)
	total.FirstP50, total.FirstP99 = percentiles(first)
	return total
}

func percentiles(values []float64) (p50, p99 float64) {
	if len(values) == 0 {
		return 0, 0
	}
	sort.Float64s(values)
	return values[len(values)/2], values[len(values)*99/100]
}

func milliseconds(duration time.Duration) float64 { return float64(duration.Microseconds()) / 1000 }
