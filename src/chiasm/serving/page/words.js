// The page's words in its languages.

export const WORDS = {
  en: {
    skip: "Skip to the question", model: "Model", second: "Second model", compare: "Compare", new: "New conversation",
    language: "한국어로 보기", other: "한국어", theme: "Dark or light", settings: "Settings",
    welcome: "Ask about a picture", welcome_more: "Drop one here, paste it, or choose a file. It goes to this server only.",
    choose: "Choose a picture", pictures: "Pictures for the next question", question: "Your question",
    question_hint: "Ask about the picture…", add: "Add a picture", send: "Ask", stop: "Stop", drop: "Drop the picture",
    key: "API key", temperature: "Temperature (0: the likeliest word)", length: "Longest answer, in tokens", done: "Done",
    look: "Where did it look?", looking: "Looking…", hide: "Hide", look_hint: "Point at a word of the answer, or tap it.",
    look_queries: "Point at a word of the answer, or tap it. This model sees the picture through its queries, each of which looks at all of it.",
    even: "Here it looked at everything about equally.",
    unseen: "of this model it is not known where it looked",
    all_words: "all words", looked: "Where “{word}” looked in the picture", you: "You asked", answered: "{model} answered",
    remove: "Remove picture {number}", picture: "Picture {number}", busy: "{model} is answering", cut: "cut off",
    stopped: "stopped", tokens: "{count} tokens · {seconds} s", no_models: "This server has no model that answers questions.",
    needs_key: "This server asks for an API key: it belongs into the settings.", full: "The server is busy. Try again in {seconds} s.",
    failed: "That did not work: {message}", offline: "The server does not answer. Is it still running?",
    not_a_picture: "“{name}” is not a picture that this page can read.",
  },
  ko: {
    skip: "질문으로 건너뛰기", model: "모델", second: "두 번째 모델", compare: "비교", new: "새 대화",
    language: "View in English", other: "English", theme: "어둡게 또는 밝게", settings: "설정",
    welcome: "사진에 대해 물어보세요", welcome_more: "사진을 끌어다 놓거나, 붙여 넣거나, 파일을 고르세요. 이 서버로만 전송됩니다.",
    choose: "사진 고르기", pictures: "다음 질문에 쓸 사진", question: "질문",
    question_hint: "사진에 대해 물어보세요…", add: "사진 추가", send: "물어보기", stop: "멈추기", drop: "사진을 놓으세요",
    key: "API 키", temperature: "온도 (0: 가장 그럴듯한 단어)", length: "가장 긴 답변 (토큰)", done: "확인",
    look: "어디를 보았나요?", looking: "살펴보는 중…", hide: "숨기기", look_hint: "답변의 단어를 가리키거나 눌러 보세요.",
    look_queries: "답변의 단어를 가리키거나 눌러 보세요. 이 모델은 사진 전체를 보는 쿼리를 거쳐 사진을 읽습니다.",
    even: "여기서는 모든 곳을 거의 고르게 보았습니다.",
    unseen: "이 모델은 어디를 보았는지 알 수 없습니다",
    all_words: "모든 단어", looked: "사진에서 “{word}”에 해당하는 곳", you: "질문", answered: "{model}의 답변",
    remove: "사진 {number} 빼기", picture: "사진 {number}", busy: "{model}이(가) 답하는 중", cut: "길이 제한으로 잘림",
    stopped: "멈춤", tokens: "토큰 {count}개 · {seconds}초", no_models: "이 서버에는 질문에 답하는 모델이 없습니다.",
    needs_key: "이 서버는 API 키가 필요합니다. 설정에 입력하세요.", full: "서버가 바쁩니다. {seconds}초 뒤에 다시 해 보세요.",
    failed: "문제가 생겼습니다: {message}", offline: "서버가 응답하지 않습니다. 아직 실행 중인가요?",
    not_a_picture: "“{name}”은(는) 이 페이지가 읽을 수 있는 사진이 아닙니다.",
  },
};

let chosen = "en";

export function word(name, values = {}) {
  return WORDS[chosen][name].replace(/\{(\w+)\}/g, (_, key) => values[key] ?? "");
}

export function translate(root) {
  for (const node of root.querySelectorAll("[data-word]")) node.textContent = word(node.dataset.word);
  for (const node of root.querySelectorAll("[data-title]")) {
    node.title = word(node.dataset.title);
    node.setAttribute("aria-label", node.title);
  }
  for (const node of root.querySelectorAll("[data-label]")) node.setAttribute("aria-label", word(node.dataset.label));
  for (const node of root.querySelectorAll("[data-placeholder]")) node.placeholder = word(node.dataset.placeholder);
}

export function speak(language) {
  chosen = language in WORDS ? language : "en";
  document.documentElement.lang = chosen;
  translate(document);
  document.getElementById("language").textContent = word("other");
}

export const language = () => chosen;
