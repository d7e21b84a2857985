"""Twenty questions in the style of SLAKE, with answers whose scores are worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

from tests.data.exam_folders import picture
from tests.evaluate.conftest import make_prediction
from ultra.evaluate.predictions import Prediction

# qid, image, language, modality, content type, closed, question, truth, answer
QUESTIONS = [
    (1, "xmlab1", "zh", "CT", "Modality", False, "这张图片的成像方式是什么?", "CT", "CT"),
    (2, "xmlab1", "zh", "CT", "Position", True, "病变在左侧还是右侧?", "左侧", "左侧。"),
    (3, "xmlab1", "zh", "CT", "Abnormality", True, "存在异常吗?", "存在", "有"),
    (4, "xmlab1", "en", "CT", "Organ", True, "Does the picture contain liver?", "Yes", "no"),
    (5, "xmlab1", "en", "CT", "Organ", False, "Which organs are shown?", "Liver, Spleen", "liver"),
    (6, "xmlab2", "zh", "CT", "Organ", True, "图像里包含肝脏吗?", "包含", "不包含"),
    (7, "xmlab2", "zh", "CT", "Position", False, "病变在哪里?", "右肺上叶", "右肺下叶"),
    (8, "xmlab2", "en", "CT", "Abnormality", False, "What is the abnormality?", "Mass", "a mass"),
    (9, "xmlab3", "zh", "MR", "Modality", False, "这是什么成像?", "MRI", "CT"),
    (10, "xmlab3", "zh", "MR", "Position", True, "左侧还是右侧?", "右侧", "左侧"),
    (11, "xmlab3", "en", "MR", "Modality", True, "Is this an MRI?", "Yes", "Yes, it is."),
    (12, "xmlab3", "en", "MR", "Organ", False, "Which organ is it?", "Brain", "brain"),
    (13, "xmlab4", "zh", "MR", "Abnormality", True, "有水肿吗?", "没有", "没有"),
    (14, "xmlab4", "zh", "MR", "Abnormality", False, "异常是什么?", "脑水肿", "脑肿瘤"),
    (15, "xmlab4", "en", "MR", "Position", False, "Where is it?", "Left Lobe", "right lobe"),
    (16, "xmlab5", "zh", "DX", "Organ", False, "这是哪个器官?", "心脏", "心脏"),
    (17, "xmlab5", "zh", "DX", "Abnormality", False, "诊断是什么?", "心脏肥大", "心脏肥大"),
    (18, "xmlab5", "zh", "DX", "Modality", True, "这是X光吗?", "是的", "是"),
    (19, "xmlab5", "en", "DX", "Position", True, "Is it upper or lower?", "Upper", "upper"),
    (20, "xmlab5", "en", "DX", "Abnormality", True, "Is it healthy?", "No", "Yes"),
]


def make_predictions() -> list[Prediction]:
    """The questions with their answers, as the model's predictions."""
    return [
        make_prediction(
            answer, truth, exam_id=image, language=language, modality=modality, task=task,
            closed=closed, question=question, question_id=str(qid), scores=None, chosen=None,
        )
        for qid, image, language, modality, task, closed, question, truth, answer in QUESTIONS
    ]  # fmt: skip


def write_set(folder: Path) -> str:
    """Write the questions as SLAKE publishes its test split and return the address."""
    rows = [
        {
            "img_id": int(image.removeprefix("xmlab")),
            "img_name": f"{image}/source.jpg",
            "question": question,
            "answer": truth,
            "q_lang": language,
            "location": "Abdomen",
            "modality": {"CT": "CT", "MR": "MRI", "DX": "X-Ray"}[modality],
            "answer_type": "CLOSED" if closed else "OPEN",
            "base_type": "vqa",
            "content_type": task,
            "triple": ["vhead", "_", "_"],
            "qid": qid,
        }
        for qid, image, language, modality, task, closed, question, truth, _ in QUESTIONS
    ]
    for image in dict.fromkeys(row["img_name"] for row in rows):
        path = folder / "imgs" / str(image)
        path.parent.mkdir(parents=True)
        path.write_bytes(picture(sum(str(image).encode())))
    (folder / "test.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return str(folder / "test.json")
