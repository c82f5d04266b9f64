//! `node serve` over real sockets: what clients get, what they are refused, and what those get who mean no good.

#![allow(missing_docs, clippy::unwrap_used)]

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use actors::backend::PlainBackend;
use actors::data::{IGNORED, MicroBatch};
use actors::transformer::Llama;
use protocol::model::Model;
use serde_json::{Value, json};
use tests::{Client, Node, PLAIN, Run, Workspace, read, text};

/// A request that goes on for so long that nobody waits for its end.
fn endless() -> Value {
    json!({"model": "model", "prompt": "What is", "max_tokens": 60_000, "temperature": 1.0, "ignore_eos": true, "stream": true})
}

struct Served {
    workspace: Workspace,
    node: Node,
    client: Client,
}

impl Served {
    /// A small model for long texts, computed by the server itself.
    fn start(more: &[&str]) -> Self {
        let workspace = Workspace::new();
        let model = workspace.model_for("model", 2, 1 << 16);
        let arguments = ["serve", "--backend", "plain", "--http", "127.0.0.1:0", "--model", text(&model)];
        let mut node = Node::start(arguments.into_iter().chain(more.iter().copied()));
        let client = Client::of(&mut node);
        Self { workspace, node, client }
    }

    fn complete(&self, more: Value) -> Value {
        let response =
            self.client.post("/v1/completions", &merged(json!({"model": "model", "prompt": "What is"}), more));
        assert_eq!(response.status, 200, "{response:?}");
        response.json()
    }
}

fn merged(mut body: Value, more: Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// The status of an error, the field that it names and what it says.
fn error(response: &tests::Response) -> (u16, String, String) {
    let json = response.json();
    let said = |name: &str| json["error"][name].as_str().unwrap_or_default().to_owned();
    assert!(!said("message").is_empty() && !said("type").is_empty(), "{response:?}");
    (response.status, said("param"), said("message"))
}

#[test]
fn a_tuned_model_answers_as_openai_does_whole_and_in_pieces() {
    let run = Run::new();
    run.train("plain", &PLAIN);
    let tuned = format!("tuned={}", run.workspace.path("plain/adapter").display());
    let arguments =
        ["serve", "--backend", "plain", "--http", "127.0.0.1:0", "--adapter", &tuned, "--model", text(&run.model)];
    let mut node = Node::start(arguments);
    let client = Client::of(&mut node);
    let models = client.get("/v1/models").json();
    let names: Vec<&str> = models["data"].as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["model", "tuned"]);
    assert_eq!(client.get("/v1/models/tuned").json()["object"], "model");
    assert_eq!(client.get("/v1/models/other").status, 404);
    assert_eq!(client.get("/health").json()["status"], "ok");

    let ask = |model: &str, more: Value| {
        let question = json!([{"role": "user", "content": "What is 1 and one?"}]);
        merged(
            json!({"model": model, "messages": question, "temperature": 1.5, "seed": 7, "max_tokens": 24, "ignore_eos": true}),
            more,
        )
    };
    let whole = |model: &str, more: Value| client.post("/v1/chat/completions", &ask(model, more)).json();
    let [base, tuned] = ["model", "tuned"].map(|model| whole(model, json!({})));
    let said = |answer: &Value| answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    assert_ne!(said(&base), said(&tuned), "an adapter that was trained says something else");
    assert_eq!((base["object"].as_str(), tuned["model"].as_str()), (Some("chat.completion"), Some("tuned")));
    let usage = &tuned["usage"];
    assert_eq!(
        usage["total_tokens"].as_u64(),
        Some(usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap())
    );

    let streamed =
        json!({"stream": true, "stream_options": {"include_usage": true}, "logprobs": true, "top_logprobs": 2});
    let events = client.post("/v1/chat/completions", &ask("tuned", streamed)).events();
    let (last, pieces) = events.split_last().unwrap();
    assert_eq!(
        (&last["usage"]["total_tokens"], last["choices"].as_array().unwrap().len()),
        (&usage["total_tokens"], 0)
    );
    assert_eq!(pieces[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let text: String = pieces.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, said(&tuned));
    assert!(pieces.iter().all(|event| event["usage"].is_null() && event["id"] == last["id"]));
    let reasons: Vec<&Value> = pieces.iter().map(|event| &event["choices"][0]["finish_reason"]).collect();
    assert_eq!(reasons.iter().filter(|reason| !reason.is_null()).count(), 1);
    assert_eq!(*reasons[reasons.len() - 1], tuned["choices"][0]["finish_reason"]);
    let told: Vec<&Value> =
        pieces.iter().filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array()).flatten().collect();
    let known = whole("tuned", json!({"logprobs": true, "top_logprobs": 2}));
    let known = known["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(told.len(), known.len());
    for (told, known) in told.iter().zip(known) {
        assert_eq!((&told["token"], told["top_logprobs"].as_array().unwrap().len()), (&known["token"], 2));
        let [own, likeliest] =
            [&told["logprob"], &told["top_logprobs"][0]["logprob"]].map(|value| value.as_f64().unwrap());
        assert!(own <= likeliest && likeliest <= 0.0, "{told}");
    }

    // Several answers, each with its own number, and repeatable by a seed.
    let several = json!({"n": 3});
    let [one, other] = [0, 1].map(|_| whole("tuned", several.clone())["choices"].clone());
    assert_eq!(one, other);
    let texts: Vec<&str> = one.as_array().unwrap().iter().map(|c| c["message"]["content"].as_str().unwrap()).collect();
    assert!(texts.len() == 3 && texts[0] != texts[1], "{texts:?}");
    let events = client.post("/v1/chat/completions", &ask("tuned", merged(several, json!({"stream": true})))).events();
    for (number, text) in texts.iter().enumerate() {
        let of = events.iter().map(|event| &event["choices"][0]).filter(|choice| choice["index"] == number);
        assert_eq!(of.filter_map(|choice| choice["delta"]["content"].as_str()).collect::<String>(), *text);
    }
    node.interrupt();
    node.finish().succeeded();
}

#[test]
fn what_a_text_ends_with_and_how_many_there_are() {
    let served = Served::start(&[]);
    let drawn = json!({"temperature": 1.5, "seed": 5, "max_tokens": 120, "ignore_eos": true});
    let with = |more: Value| served.complete(merged(drawn.clone(), more));
    let whole = with(json!({}));
    let text = whole["choices"][0]["text"].as_str().unwrap().to_owned();
    assert_eq!(
        (whole["object"].as_str(), &whole["usage"]["completion_tokens"]),
        (Some("text_completion"), &json!(120))
    );
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    // A piece from behind the beginning of the text ends it before that piece.
    let characters: Vec<char> = text.chars().collect();
    let plain = |pair: &&[char]| pair.iter().all(char::is_ascii_graphic);
    let stop: String = characters[8..].windows(2).find(plain).unwrap().iter().collect();
    let expected = text.split(&stop).next().unwrap();
    for stop in [json!(stop), json!(["\u{1}\u{2}\u{3}", stop])] {
        let ended = with(json!({"stop": stop}));
        assert_eq!(
            (&ended["choices"][0]["text"], &ended["choices"][0]["finish_reason"]),
            (&json!(expected), &json!("stop"))
        );
    }
    // Prompts in every shape, each with its own answers.
    let model = Model::open(served.workspace.path("model")).unwrap();
    let tokens = model.tokenizer().unwrap().encode("What is", true).unwrap();
    for prompt in [json!(["What is", "He"]), json!([tokens, [80, 81]])] {
        let both = with(json!({"prompt": prompt, "n": 2}));
        let choices = both["choices"].as_array().unwrap();
        let texts: Vec<&str> = choices.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
        assert!(texts.len() == 4 && texts[0] == text && texts[1] != text && texts[2] != text, "{texts:?}");
        assert!(choices.iter().enumerate().all(|(number, choice)| choice["index"] == number));
        assert_eq!(both["usage"]["completion_tokens"], 480);
    }
}

#[test]
fn an_echo_tells_what_the_training_path_computes() {
    let served = Served::start(&[]);
    let model = Arc::new(Model::open(served.workspace.path("model")).unwrap());
    let backend = Arc::new(PlainBackend::new(&model).unwrap());
    let llama = Llama::new(Arc::clone(&model), backend).unwrap();
    let tokenizer = model.tokenizer().unwrap();
    let said = "What is the answer, in two words? Grüße";
    let tokens = tokenizer.encode(said, true).unwrap();
    let asked = json!({"echo": true, "max_tokens": 1, "logprobs": 1, "temperature": 0});
    for prompt in [json!(said), json!([tokens])] {
        let echoed = served.complete(merged(asked.clone(), json!({"prompt": prompt})));
        let choice = &echoed["choices"][0];
        assert!(choice["text"].as_str().unwrap().starts_with(said));
        let told = &choice["logprobs"];
        let list = |name: &str| told[name].as_array().unwrap().clone();
        let [texts, logprobs, tops, offsets] = ["tokens", "token_logprobs", "top_logprobs", "text_offset"].map(list);
        assert_eq!([texts.len(), logprobs.len(), tops.len(), offsets.len()], [tokens.len() + 1; 4]);
        assert!(logprobs[0].is_null() && tops[0].is_null() && offsets[0] == 0);
        for (place, logprob) in logprobs.iter().enumerate().skip(1).take(tokens.len() - 1) {
            // The loss of this token alone, by the path that trains.
            let mut targets = vec![IGNORED; tokens.len()];
            targets[place - 1] = tokens[place];
            let batch = MicroBatch::new([(&tokens[..], targets)], 0, 1);
            let expected = -llama.evaluate(&batch, None).unwrap();
            let found = logprob.as_f64().unwrap();
            assert!((found - expected).abs() < 1e-3, "token {place}: {found} beside {expected}");
            let top = tops[place].as_object().unwrap().values().filter_map(Value::as_f64).fold(f64::MIN, f64::max);
            assert!(top >= found, "token {place}");
        }
        // What is written is the likeliest token.
        let (written, top) = (&logprobs[tokens.len()], tops[tokens.len()].as_object().unwrap());
        assert_eq!(top.values().collect::<Vec<_>>(), [written]);
        let offset = offsets[tokens.len()].as_u64().unwrap() as usize;
        assert_eq!(
            offset,
            texts[..tokens.len()].iter().map(|text| text.as_str().unwrap().chars().count()).sum::<usize>()
        );
    }
    // Nothing is written where nothing is asked for.
    let read = served.complete(json!({"prompt": said, "echo": true, "max_tokens": 0, "logprobs": 0}));
    assert_eq!((read["choices"][0]["text"].as_str(), &read["usage"]["completion_tokens"]), (Some(said), &json!(0)));
}

#[test]
fn an_encrypted_model_serves_what_a_plain_one_does() {
    let run = Run::new();
    let (worker, address) = run.worker(1, &[]);
    let serve = |more: &[&str]| {
        let arguments = ["serve", "--no-mdns", "--http", "127.0.0.1:0", "--model", text(&run.model)];
        Node::start_in(&run.home(), arguments.into_iter().chain(more.iter().copied()))
    };
    let ask = |node: &mut Node| {
        let client = Client::of(node);
        let prompt =
            json!({"model": "model", "prompt": "What is the answer?", "echo": true, "max_tokens": 4, "logprobs": 0});
        let told = client.post("/v1/completions", &merged(prompt, json!({"temperature": 0}))).json();
        let logprobs = told["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().clone();
        logprobs.iter().filter_map(Value::as_f64).take(15).collect::<Vec<_>>()
    };
    let listen = ["--listen", "/ip4/127.0.0.1/tcp/0"];
    let mut encrypted = serve(&[&listen[..], &["--peer", &address]].concat());
    let mut plain = serve(&["--backend", "plain"]);
    let (found, expected) = (ask(&mut encrypted), ask(&mut plain));
    assert!(expected.len() == 15 && found.len() == 15, "{expected:?}");
    // A token's probability of 1e-6 moves with the noise of its products, which differs from run to run: by 0.12 to 0.26
    // (root mean square over the fifteen) in twenty-five runs. A row in a wrong place is off by several times as much.
    let squares = found.iter().zip(&expected).map(|(found, expected)| (found - expected).powi(2)).sum::<f64>();
    assert!((squares / 15.0).sqrt() < 0.5, "{found:?} beside {expected:?}");
    let [found, expected] = [found, expected].map(|all| all.iter().sum::<f64>());
    assert!((found / expected - 1.0).abs() < 0.02, "{found} beside {expected}");
    encrypted.interrupt();
    encrypted.finish().succeeded();
    assert!(!worker.remembers("the answer?"), "a worker never sees a prompt");
}

#[test]
fn requests_that_cannot_be_followed_are_refused_by_name() {
    let served = Served::start(&["--most-answers", "4", "--context", "64"]);
    let post = |path: &str, body: &str| served.client.raw(&served.client.request("POST", path, Some(body)));
    let long = "a".repeat(200);
    for (path, body, status, param, said) in [
        ("/v1/completions", "", 400, "", "JSON"),
        ("/v1/completions", "{\"model\": \"model\"", 400, "", "JSON"),
        ("/v1/completions", "[1, 2]", 400, "", "JSON"),
        ("/v1/completions", r#"{"prompt": "a"}"#, 400, "model", "missing"),
        (
            "/v1/chat/completions",
            r#"{"model": "model", "messages": [{"role": "user", "content": "a", "content": "b"}]}"#,
            400,
            "",
            "`content` occurs twice",
        ),
        (
            "/v1/chat/completions",
            r#"{"model": "model", "messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"tools": []}}"#,
            400,
            "chat_template_kwargs.tools",
            "not supported",
        ),
        ("/v1/completions", r#"{"model": "gpt-9", "prompt": "a"}"#, 404, "model", "gpt-9"),
        ("/v1/completions", r#"{"model": "model", "prompt": "a", "suffix": "b"}"#, 400, "suffix", "not supported"),
        ("/v1/completions", r#"{"model": "model", "prompt": "a", "best_of": 3}"#, 400, "best_of", "not supported"),
        (
            "/v1/completions",
            r#"{"model": "model", "prompt": "a", "frequency_penalty": 1}"#,
            400,
            "frequency_penalty",
            "not",
        ),
        (
            "/v1/completions",
            r#"{"model": "model", "prompt": "a", "tempreature": 1}"#,
            400,
            "tempreature",
            "not a field",
        ),
        ("/v1/completions", r#"{"model": "model", "prompt": "a", "n": 5}"#, 400, "n", "4 may be written"),
        ("/v1/completions", r#"{"model": "model", "prompt": ""}"#, 400, "prompt", "no tokens"),
        ("/v1/completions", r#"{"model": "model", "prompt": [100000]}"#, 400, "prompt", "vocabulary"),
        ("/v1/chat/completions", r#"{"model": "model", "messages": []}"#, 400, "messages", "empty"),
        (
            "/v1/chat/completions",
            r#"{"model": "model", "messages": [{"role": "user"}]}"#,
            400,
            "messages[0].content",
            "",
        ),
        ("/v1/embeddings", "{}", 404, "", "/v1/embeddings"),
    ] {
        let (found, named, message) = error(&post(path, body));
        assert_eq!((found, named.as_str()), (status, param), "{body}: {message}");
        assert!(message.contains(said), "{body}: {message}");
    }
    let body = json!({"model": "model", "prompt": long}).to_string();
    let (status, _, message) = error(&post("/v1/completions", &body));
    assert!(status == 400 && message.contains("64"), "{message}");
    assert_eq!(served.client.get("/v1/completions").status, 405);
    assert_eq!(served.client.raw(&served.client.request("OPTIONS", "/v1/completions", None)).status, 405);
    assert_eq!(
        served.client.clone().with("Content-Type", "text/plain").post("/v1/completions", &json!({})).status,
        415
    );
    assert_eq!(served.client.clone().with("Host", "evil.example").get("/").status, 403);
    let foreign = served.client.clone().with("Origin", "http://evil.example").get("/v1/models");
    assert!(foreign.status == 403 && foreign.header("access-control-allow-origin").is_none(), "{foreign:?}");
    let page = served.client.get("/");
    assert!(page.status == 200 && page.body.contains("<title>Velum</title>"));
    assert!(page.header("content-security-policy").unwrap().starts_with("default-src 'none'; script-src 'sha256-"));
}

#[test]
fn a_token_is_asked_for_where_there_is_one_and_where_others_can_ask() {
    let workspace = Workspace::new();
    let model = workspace.model("model", 1, 2);
    let token = workspace.write("token", "a-token-for-this-test\n");
    let serve = |http: &str, more: &[&str]| {
        let arguments = ["serve", "--backend", "plain", "--model", text(&model), "--http", http];
        Node::start(arguments.into_iter().chain(more.iter().copied()))
    };
    let refused = serve("0.0.0.0:0", &[]).finish().refused();
    assert!(refused.contains("--token-file") && refused.contains("VELUM_TOKEN"), "{refused}");
    let short = workspace.write("short", "abc\n");
    let refused = serve("127.0.0.1:0", &["--token-file", text(&short)]).finish().refused();
    assert!(refused.contains("at least 16") && !refused.contains("abc"), "{refused}");
    let refused = serve("127.0.0.1:0", &["--adapter", "model=x"]).finish().refused();
    assert!(refused.contains("the base model is called so"), "{refused}");

    let mut node = serve("127.0.0.1:0", &["--token-file", text(&token)]);
    let client = Client::of(&mut node);
    let refused = client.get("/v1/models");
    assert_eq!((refused.status, refused.header("www-authenticate")), (401, Some("Bearer")));
    assert_eq!(client.get("/%761/models").status, 401, "a path that is spelled otherwise");
    let prompt = json!({"model": "model", "prompt": "a", "max_tokens": 1});
    assert_eq!(client.post("/v1/completions", &prompt).status, 401);
    assert_eq!(client.post("/%761/completions", &prompt).status, 401);
    assert_eq!(
        client.clone().with("Authorization", "Bearer another-token-here").post("/v1/completions", &prompt).status,
        401
    );
    assert_eq!(client.get("/health").status, 200);
    let known = client.with("Authorization", "Bearer a-token-for-this-test");
    assert_eq!(known.get("/v1/models").status, 200);
    assert_eq!(known.post("/v1/completions", &prompt).status, 200);
}

#[test]
fn who_leaves_makes_room_and_who_comes_too_many_is_sent_away() {
    let served = Served::start(&["--most-answers", "2"]);
    let short = json!({"model": "model", "prompt": "a", "max_tokens": 1});
    let is_served = || served.client.post("/v1/completions", &short).status == 200;
    let comes_back = |what: &str| {
        let since = Instant::now();
        while !is_served() {
            assert!(since.elapsed() < Duration::from_secs(60), "{what}");
            thread::sleep(Duration::from_millis(50));
        }
    };
    // Two answers that would take minutes fill the house.
    let streams = [0, 1].map(|_| served.client.begin("/v1/completions", &endless(), "data: "));
    let busy = served.client.post("/v1/completions", &short);
    assert_eq!((busy.status, busy.header("retry-after")), (429, Some("5")), "{busy:?}");
    assert_eq!(busy.json()["error"]["type"], "rate_limit_error");
    drop(streams);
    comes_back("a stream whose client left goes on");
    // The same of answers that come whole, whose client says nothing more, and of one that only stops sending.
    for gone in [Shutdown::Both, Shutdown::Write] {
        let whole = merged(endless(), json!({"stream": false, "n": 2}));
        let request = served.client.request("POST", "/v1/completions", Some(&whole.to_string()));
        let since = Instant::now();
        // One that comes while somebody asks whether it came is sent away itself, and comes again.
        let waiting = loop {
            let mut waiting = served.client.connect();
            waiting.write_all(&request).unwrap();
            thread::sleep(Duration::from_millis(500));
            if !is_served() {
                break waiting;
            }
            assert!(since.elapsed() < Duration::from_secs(60), "two answers are never waited for");
        };
        waiting.shutdown(gone).unwrap();
        comes_back("an answer whose client left goes on");
    }
}

#[test]
fn hostile_clients_harm_nobody() {
    let mut served = Served::start(&[]);
    let client = served.client.clone();
    let answered = || {
        let answer = client.post("/v1/completions", &json!({"model": "model", "prompt": "a", "max_tokens": 2}));
        assert_eq!(answer.status, 200, "{answer:?}");
    };
    // Many that say nothing, or something, byte by byte, or never end.
    let silent: Vec<_> = (0..40).map(|_| client.connect()).collect();
    let slow: Vec<_> = (0..40)
        .map(|_| {
            let mut stream = client.connect();
            stream.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: ").unwrap();
            stream
        })
        .collect();
    answered();
    // Bodies that are too large, whether they say so or not.
    let head =
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n";
    let large =
        client.raw(&[format!("{head}Content-Length: 5000000\r\n\r\n").as_bytes(), &vec![b' '; 5_000_000]].concat());
    assert_eq!(error(&large).0, 413, "{large:?}");
    let chunk = [b"10000\r\n".as_slice(), &[b' '; 0x10000], b"\r\n"].concat();
    let mut endless = client.connect();
    endless.write_all(format!("{head}Transfer-Encoding: chunked\r\n\r\n").as_bytes()).unwrap();
    for _ in 0..100 {
        if endless.write_all(&chunk).is_err() {
            break;
        }
    }
    assert_eq!(read(endless).status, 413);
    // Both ways to say where a body ends, a length that is none, a head without an end, and what is no HTTP at all.
    let smuggled = format!("{head}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n");
    for bytes in [
        smuggled.as_bytes(),
        format!("{head}Content-Length: -1\r\n\r\n").as_bytes(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        &[b"GET /".as_slice(), &vec![b'a'; 200_000], b" HTTP/1.1\r\n\r\n"].concat(),
    ] {
        let mut stream = client.connect();
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        let all = String::from_utf8_lossy(&all);
        assert!(all.is_empty() || all.starts_with("HTTP/1.1 4"), "{all}");
    }
    // JSON as deep as a body is large.
    let deep = format!("{{\"model\": {}", "[".repeat(1_000_000));
    assert_eq!(error(&client.raw(&client.request("POST", "/v1/completions", Some(&deep)))).0, 400);
    answered();
    drop((silent, slow));
    assert!(served.node.is_running());
    served.node.interrupt();
    served.node.finish().succeeded();
}

#[test]
fn ctrl_c_lets_answers_end_and_takes_no_more() {
    let served = Served::start(&[]);
    let long = merged(endless(), json!({"max_tokens": 2000}));
    let stream = served.client.begin("/v1/completions", &long, "data: ");
    served.node.interrupt();
    let ended = read_on(stream);
    assert!(ended.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"), "{}", &ended[ended.len().saturating_sub(200)..]);
    served.node.finish().succeeded();

    let mut served = Served::start(&[]);
    let stream = served.client.begin("/v1/completions", &endless(), "data: ");
    served.node.interrupt();
    served.node.expect_note("no more requests are taken");
    served.node.interrupt();
    served.node.finish().succeeded();
    assert!(!read_on(stream).contains("[DONE]"), "a second one ends it");
}

/// What is left of a connection.
fn read_on(mut stream: std::net::TcpStream) -> String {
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all);
    String::from_utf8_lossy(&all).into_owned()
}
