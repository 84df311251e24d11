"""Retrieval for a language model with LangChain: python langchain_rag.py "QUESTION"

The prompt holds the texts that answer, with their ids. `model` is any chat model; here one that
needs no key and no network repeats the best text. Needs `pip install 'vdr-db[langchain]'`.
"""

import sys

from langchain_core.messages import AIMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough

from vdr_db.connectors import VDRQdrant
from vdr_db.integrations.langchain import VDRRetriever

CHAPTERS = {
    "service": "A bicycle is serviced once a year. Oil the chain after every ride in the rain.",
    "brakes": "Bleed the brakes when the lever feels soft: open the valve, press the lever slowly, "
    "close the valve and let go, until no more bubbles come.",
    "tyres": "Pump the tyres to four bar. Worn tyres puncture, so replace them every 4,000 km.",
}


def context(documents):
    return "\n".join(f"[{document.id}] {document.page_content}" for document in documents)


def repeat_best(prompt):
    sources = [line for line in prompt.to_string().splitlines() if line.startswith("[")]
    return AIMessage(sources[0] if sources else "I do not know.")


with VDRQdrant("manual", path=":memory:") as manual:
    # Long chapters: passages=True, and each source is the passage that matches best.
    manual.add_texts(CHAPTERS.values(), ids=CHAPTERS.keys())
    prompt = ChatPromptTemplate.from_template(
        "Answer from these sources alone, and name them.\n{context}\n\nQuestion: {question}"
    )
    model = RunnableLambda(repeat_best)  # ChatOpenAI(...), ChatOllama(...), as you like
    retriever = VDRRetriever(collection=manual, limit=2)
    chain = {"context": retriever | context, "question": RunnablePassthrough()} | prompt | model
    print(chain.invoke(sys.argv[1] if len(sys.argv) > 1 else "My brakes feel soft.").content)
