"""Clinical notes that nobody wrote about anybody: a few sentences of a specialty, for trying out a study of texts."""

from collections.abc import Sequence

import numpy as np

_SEED = 2026
_NOTES = 40  # of each specialty
_GENERAL = (
    "The patient is seen for follow-up.",
    "Vital signs are stable.",
    "There is no known drug allergy.",
    "The findings were discussed and questions were answered.",
    "Return in six weeks, sooner if symptoms get worse.",
    "Laboratory values are within normal limits.",
    "The family history is not contributory.",
    "Sleep and appetite are good.",
)
_FINDINGS = {
    "cardiovascular-pulmonary": (
        "There is chest pain on exertion, relieved by rest.",
        "The echocardiogram shows a normal ejection fraction.",
        "Breath sounds are diminished at the right base.",
        "The electrocardiogram shows sinus rhythm without ischaemic changes.",
        "Coronary angiography is planned.",
    ),
    "orthopaedic": (
        "The knee is swollen, and its range of motion is limited.",
        "Radiographs show a healed fracture of the distal radius.",
        "The rotator cuff is tender with abduction of the shoulder.",
        "Weight bearing as tolerated on the left hip.",
        "The carpal tunnel was released under local anaesthesia.",
    ),
    "gastroenterology": (
        "Colonoscopy shows a small polyp in the sigmoid colon.",
        "There is heartburn after meals and at night.",
        "The abdomen is soft, with mild epigastric tenderness.",
        "The gallbladder was removed by laparoscopy.",
        "Biopsies of the duodenum were taken.",
    ),
    "obstetrics-gynaecology": (
        "The pregnancy is at 34 weeks, and the fetal heart rate is regular.",
        "The cervix is closed, and there is no bleeding.",
        "Ultrasound of the pelvis shows a fibroid of the uterus.",
        "Contractions began this morning.",
        "The ovaries are of normal size.",
    ),
    "urology": (
        "The prostate is enlarged without a nodule.",
        "Cystoscopy shows no lesion of the bladder.",
        "There is a stone in the left ureter.",
        "Urinary frequency and nocturia are better with treatment.",
        "The catheter was removed, and voiding was complete.",
    ),
    "neurology": (
        "There is a throbbing headache with photophobia.",
        "The cranial nerves are intact, and reflexes are symmetric.",
        "Imaging of the brain shows an old lacunar infarct.",
        "The last seizure was in spring.",
        "There is a resting tremor of the right hand.",
    ),
    "ear-nose-throat": (
        "The tympanic membrane is retracted, and hearing is reduced.",
        "The tonsils are enlarged with exudate.",
        "Nasal endoscopy shows a deviated septum.",
        "Hoarseness of the voice has lasted for a month.",
        "The sinuses are clear on imaging.",
    ),
    "ophthalmology": (
        "Visual acuity is 20/40 in the right eye.",
        "There is a cataract of the left lens.",
        "Intraocular pressure is normal in both eyes.",
        "The fundus shows no retinopathy.",
        "A lens was implanted by phacoemulsification.",
    ),
}


def made_up_notes(classes: Sequence[str]) -> list[tuple[int, str]]:
    """Notes and the index of their specialty in ``classes``, in mixed order; the same at every call."""
    rng = np.random.default_rng(_SEED)
    notes = []
    for label, name in enumerate(classes):
        for _ in range(_NOTES):
            general = rng.choice(len(_GENERAL), 2, replace=False)
            special = rng.choice(len(_FINDINGS[name]), 2, replace=False)
            sentences = [*(_GENERAL[i] for i in general), *(_FINDINGS[name][i] for i in special)]
            notes.append((label, " ".join(sentences[i] for i in rng.permutation(4))))
    return [notes[i] for i in rng.permutation(len(notes))]
